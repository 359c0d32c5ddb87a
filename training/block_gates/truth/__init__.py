"""What a gate learns: the specification in PyTorch, and a kernel that stores no logits."""

from .reference import block_truth, blocks_before, chunks, largest_weights

__all__ = ["block_truth", "blocks_before", "chunks", "largest_weights"]
