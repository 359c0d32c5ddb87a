"""Exceptions as cells of a table."""

import traceback

import torch


def reason(error: Exception) -> str:
    """A line for the column `error`; the traceback goes to the log."""
    traceback.print_exception(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
