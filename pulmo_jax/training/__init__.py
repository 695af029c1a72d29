"""Training: state and step, loop, callbacks, checkpoints, optimizers, distributed devices."""
