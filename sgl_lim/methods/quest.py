"""Quest (arXiv 2406.10774): each layer chooses pages of tokens by how large q·k can be in them.

Of each page of 16 tokens the elementwise minimum and maximum of its keys are kept. At every decode step each layer
after the first two takes the pages with the largest bound, and attends to these alone. By its own rule a set is what
ranks best and the page of the current token: there are neither sinks nor a window. The paper has a set for each query
head. Here each KV head has one, by the largest bound of its query heads, because query heads that read one KV head read
its tokens together; with as many KV heads as query heads the two are the same.
"""

from dataclasses import dataclass

from torch import Tensor

from lim_kernels import choose_pages, expand_pages, score_pages
from lim_kernels.block_gates import GatedBlocks
from lim_kernels.page_bounds import PAGE, PageBounds
from sgl_lim.methods.base import Budgeted, CombineRanks, Role
from sgl_lim.methods.parameters import Choice, parameter

DENSE_LAYERS = 2
"""The paper leaves so many dense: their attention is not sparse."""


@dataclass(frozen=True)
class Quest(Budgeted):
    """Every layer from the third on chooses whole pages for each KV head."""

    name = "quest"
    page = PAGE

    scope: str = parameter("kv_head", Choice(("kv_head",)), "Each KV head has a set")

    @property
    def per_kv_head(self) -> bool:
        """Always."""
        return True

    @property
    def sizes_vary(self) -> bool:
        """The last page of a row need not be full."""
        return True

    def role(self, layer: int) -> Role:
        """The first two layers are dense, every other chooses for itself."""
        return Role.DENSE if layer < DENSE_LAYERS else Role.OWN

    def choose_own(
        self,
        q: Tensor,
        pages: PageBounds | GatedBlocks,
        slots: Tensor,
        seq_lens: Tensor,
        combine_ranks: CombineRanks | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best pages and the last one of each row and KV head; a row within the budget keeps all it has."""
        assert isinstance(pages, PageBounds)
        scores = score_pages(q, pages, slots, seq_lens, score_beyond=self.budget)
        if combine_ranks is not None:
            scores = combine_ranks(scores, "max")
        chosen = choose_pages(scores, seq_lens, page=PAGE, most=self.budget // PAGE)
        return expand_pages(*chosen, slots, seq_lens, page=PAGE)
