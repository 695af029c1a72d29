"""Shared parts of the tasks: frames of training, prediction and reports; run directories."""
