"""Accounts of a decode step, kept on the device."""

from lim_kernels.count_step.api import TOTALS, Ledger, count_sets, count_step

__all__ = ["TOTALS", "Ledger", "count_sets", "count_step"]
