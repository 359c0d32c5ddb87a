"""Gates of SeerAttention-R (arXiv 2506.08889) as their authors publish them: what a folder says and holds."""

from sgl_lim.gates.config import GateConfig, GateError
from sgl_lim.gates.folder import find, read_config
from sgl_lim.gates.weights import load_gates, save_gates

__all__ = ["GateConfig", "GateError", "find", "load_gates", "read_config", "save_gates"]
