"""Measurements of kernels, decode steps, servers and methods: `python -m benchmarks.NAME --help`, from the root."""
