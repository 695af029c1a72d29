"""From score maps to thresholds with a known false-alarm rate, lists of findings, and figures of merit."""
