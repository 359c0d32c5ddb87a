"""Accounts of a decode step, kept on the device."""

from lim_kernels.count_decode_step.api import count_decode_step, count_sets
from lim_kernels.count_decode_step.ledger import TOTALS, Ledger

__all__ = ["TOTALS", "Ledger", "count_decode_step", "count_sets"]
