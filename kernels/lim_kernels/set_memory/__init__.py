"""Sets that outlive a step: by row, and as the time of the last selection by KV slot."""

from lim_kernels.set_memory.api import decide_actions, keep_sets, place_sets
from lim_kernels.set_memory.state import Decision, SetMemory

__all__ = ["Decision", "SetMemory", "decide_actions", "keep_sets", "place_sets"]
