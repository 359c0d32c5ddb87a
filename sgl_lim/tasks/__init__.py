"""Problem sources for the reasoning programs: generated chains and JSONL files."""
