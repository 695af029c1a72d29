"""The machine: console, files, locks, memory, signals."""
