"""A user's package: a task, a method, a model, a loss, a callback, an image format and a figure."""
