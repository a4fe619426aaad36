"""Measurements on this machine: `python -m bench` prints a table and writes it to bench/results."""
