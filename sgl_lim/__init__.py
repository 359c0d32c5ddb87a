"""LessIsMore sparse-attention decoding inside an unmodified SGLang."""

from sgl_lim import command as _command

__version__ = "0.1.0"

if _command.about_to_run(__name__):
    _command.leave_at_interrupt()
