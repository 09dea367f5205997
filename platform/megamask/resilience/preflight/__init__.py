"""Fitness of a machine: one list of checks, run by `megamask doctor` and by the node wrapper before ranks start."""
