"""The command line: configs composed by Hydra and validated, help, errors, sweeps."""
