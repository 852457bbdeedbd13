"""Measurements that anyone can repeat; each script prints a table and writes benchmarks/results/NAME.json."""
