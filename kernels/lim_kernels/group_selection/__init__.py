"""Token selection in which the rows of a prefix group choose the same tokens of what they share."""

from lim_kernels.group_selection.api import COMBINATIONS, choose_for_groups, groups_of_sets

__all__ = ["COMBINATIONS", "choose_for_groups", "groups_of_sets"]
