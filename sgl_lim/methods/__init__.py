"""Selection methods, one file each. To add one, write its file and name it here."""

from sgl_lim.methods.base import PREFIX_SELECTIONS, SCOPES, Method, Role, SharedSets
from sgl_lim.methods.full import Full
from sgl_lim.methods.lessismore import LessIsMore
from sgl_lim.methods.quest import Quest
from sgl_lim.methods.tidaldecode import TidalDecode
from sgl_lim.methods.window import Window

METHODS: dict[str, type[Method]] = {method.name: method for method in (LessIsMore, TidalDecode, Quest, Window, Full)}

__all__ = [
    "METHODS",
    "PREFIX_SELECTIONS",
    "SCOPES",
    "Full",
    "LessIsMore",
    "Method",
    "Quest",
    "Role",
    "SharedSets",
    "TidalDecode",
    "Window",
]
