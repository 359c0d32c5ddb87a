"""Learnt gates that score blocks of keys for each KV head (SeerAttention-R, arXiv 2506.08889)."""

from lim_kernels.block_gates.api import gate_keys, score_blocks
from lim_kernels.block_gates.state import EPSILON, POOLS, Gate, GatedBlocks, Rotation

__all__ = ["EPSILON", "POOLS", "Gate", "GatedBlocks", "Rotation", "gate_keys", "score_blocks"]
