"""What a row longer than the budget does in a step, where sets outlive a step: bits of one byte a row."""

KEEP = 0
"""Attends to the set that it has at selection layers too (no bit)."""
SELECT = 1
"""Attends to everything at selection layers, and chooses."""
RECALL = 2
"""The set that it has is what selections had left on its KV slots."""
EARLY = 4
"""Attends to the set that it has in the layers before the first selection layer."""
