"""Reasoning programs over a SGLang endpoint: solve and self-consistency, graded, resumable, with a summary.

Run them with `python -m sgl_lim.programs --help`. Only `reasoning` imports SGLang.
"""
