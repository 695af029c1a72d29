"""Inference on complete images: score maps, calibration, assessment, and output files."""
