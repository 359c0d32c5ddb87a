"""Small public checkpoints that come as packages of the Python package index, brought into Hugging Face form."""

from sgl_lim.checkpoints.catalogue import CATALOGUE, CheckpointError, Unreachable
from sgl_lim.checkpoints.store import default_folder, ensure

__all__ = ["CATALOGUE", "CheckpointError", "Unreachable", "default_folder", "ensure"]
