"""Accounts of a decode step, kept on the device."""

from lim_kernels.count_step.api import TOTALS, Ledger, count_step
from lim_kernels.count_step.reference import KEEP, RECALL, SELECT

__all__ = ["KEEP", "RECALL", "SELECT", "TOTALS", "Ledger", "count_step"]
