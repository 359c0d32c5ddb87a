"""Sets by row that were chosen where tokens were verified, and what drafts behind these attend to."""

from lim_kernels.draft_sets.api import place_drafts
from lim_kernels.draft_sets.state import DraftMemory, DraftSizes

__all__ = ["DraftMemory", "DraftSizes", "place_drafts"]
