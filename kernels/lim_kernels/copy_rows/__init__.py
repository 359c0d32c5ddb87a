"""Snapshot of a decode step's rows of the request pool."""

from lim_kernels.copy_rows.api import copy_rows

__all__ = ["copy_rows"]
