"""Which methods can draft tokens that a dense pass verifies; every reason why not names a flag and a way out."""

from sgl_lim.methods import Method
from sgl_lim.methods.ranked import Ranked


def draft_problems(method: Method, *, guided: bool) -> list[str]:
    """Why a method cannot draft.

    Args:
        guided: whether drafts attend to sets that the verification left, rather than decode as the method does.
    """
    name, found = f"--lim-method {method.name}", []
    if method.page > 1:
        return [f"{name}: it learns from the keys of pages, and rejected drafts are taken back; take lessismore"]
    if method.name == "full":
        return [f"{name}: drafts would read as much as the verification; take lessismore"]
    if guided and not isinstance(method, Ranked):
        found.append(f"{name}: it chooses no sets that could guide drafts; take lessismore, or --lim-drafts unguided")
    keeping = method.keeping
    if keeping is not None:
        flags = [f"--lim-selection-interval {keeping.interval}"] * (keeping.interval > 1)
        flags += ["--lim-early-sets on"] * keeping.early
        found += [f"{flag}: drafts of one run share their sets without it; leave it out" for flag in flags]
    return found
