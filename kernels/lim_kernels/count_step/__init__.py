"""Accounts of a decode step, kept on the device."""

from lim_kernels.count_step.api import KEEP, RECALL, SELECT, TOTALS, Ledger, count_step

__all__ = ["KEEP", "RECALL", "SELECT", "TOTALS", "Ledger", "count_step"]
