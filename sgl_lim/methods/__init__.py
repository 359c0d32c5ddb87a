"""Selection methods, one file each. To add one, write its file and name it in `registry`, or offer an entry point."""

from sgl_lim.methods.base import CombineRanks, HeadsOfRank, Keeping, Method, Role, SharedSets
from sgl_lim.methods.full import Full
from sgl_lim.methods.lessismore import LessIsMore
from sgl_lim.methods.quest import Quest
from sgl_lim.methods.registry import DEFAULT, METHODS
from sgl_lim.methods.seerattention import SeerAttention
from sgl_lim.methods.tidaldecode import TidalDecode
from sgl_lim.methods.window import Window

__all__ = [
    "DEFAULT",
    "METHODS",
    "CombineRanks",
    "Full",
    "HeadsOfRank",
    "Keeping",
    "LessIsMore",
    "Method",
    "Quest",
    "Role",
    "SeerAttention",
    "SharedSets",
    "TidalDecode",
    "Window",
]
