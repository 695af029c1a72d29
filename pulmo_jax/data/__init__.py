"""From files to NumPy batches: sources, splits, transforms and the one pipeline."""
