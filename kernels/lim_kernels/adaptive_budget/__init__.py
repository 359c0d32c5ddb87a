"""Budgets and windows of rows by the attention that their tokens hold."""

from lim_kernels.adaptive_budget.api import adapt_budgets

__all__ = ["adapt_budgets"]
