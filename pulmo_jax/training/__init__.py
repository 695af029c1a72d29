"""State, step, loop, callbacks, checkpoints."""
