"""What tasks share: the frames of training, prediction and reports, and the run directory."""
