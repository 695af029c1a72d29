"""Flax networks: definitions only."""
