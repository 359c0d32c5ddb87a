"""What a decode step runs: the backend, its state, its counters."""
