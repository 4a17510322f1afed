"""Benchmarks: `make bench`, or `python -m experiments.benchmarks NAME`. Ratios are measured side by side in one run."""
