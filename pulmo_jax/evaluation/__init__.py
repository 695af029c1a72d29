"""Calibration of thresholds and p-values, detection of regions, and figures of merit."""
