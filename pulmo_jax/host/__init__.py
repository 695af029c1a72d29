"""The host machine: console, files, locks, memory and signals."""
