"""Experiments that travel with fedsim, found by name: `fedsim run fedavg/digits`."""
