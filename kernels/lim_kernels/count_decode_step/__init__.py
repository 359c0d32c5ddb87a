"""Accounts of a decode step, kept on the device."""

from lim_kernels.count_decode_step.api import count_decode_step, count_sets
from lim_kernels.count_decode_step.ledger import TOTALS, Layers, Ledger, Sharing

__all__ = ["TOTALS", "Layers", "Ledger", "Sharing", "count_decode_step", "count_sets"]
