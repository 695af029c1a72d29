"""Typed configs and the `_target_` nodes that they may build."""
