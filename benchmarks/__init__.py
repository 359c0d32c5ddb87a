"""Measurements of kernels, decode steps, servers and methods: `python -m benchmarks.NAME --help`, from the root."""

from sgl_lim import command as _command

_LIGHT = ("benchmarks.machine", "benchmarks.plot")  # nothing to wait for

if _module := _command.about_to_run(__name__):
    _command.leave_at_interrupt()
    if _module not in _LIGHT:
        _command.announce(_module)
