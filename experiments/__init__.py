"""One script for each table, figure or asset: `python -m experiments.NAME`."""
