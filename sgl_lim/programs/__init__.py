"""Reasoning programs over a SGLang endpoint, graded and resumable: solve, self-consistency, tree of thought,
budget forcing; on one server or on several beside each other.

Run them with `python -m sgl_lim.programs --help`. Only `reasoning`, `budget_forcing` and
`frontend_state` import SGLang.
"""
