"""Pure array mathematics: no files, no config, no networks."""
