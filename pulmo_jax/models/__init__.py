"""Network definitions (Flax NNX)."""
