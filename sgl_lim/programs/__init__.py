"""Reasoning programs over a SGLang endpoint, graded and resumable: solve, self-consistency, tree of thought.

Run them with `python -m sgl_lim.programs --help`. Only `reasoning` imports SGLang.
"""
