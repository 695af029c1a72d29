"""One package for each task; none imports another."""
