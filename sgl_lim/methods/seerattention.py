"""SeerAttention-R (arXiv 2506.08889): each layer chooses blocks of keys by a gate that was trained for it.

A gate makes one key of each block of keys, and one query of the query heads of each KV head. At every decode step each
layer takes the blocks whose gate keys fit that query best, and the block of the current token. There are neither sinks
nor a window. The block of the current token counts among the budget's blocks here. With a threshold only blocks are
read whose share of the softmax over all earlier blocks is larger; the authors have no limit beside it, here the budget
is one.
"""

from dataclasses import dataclass

from torch import Tensor

from lim_kernels import choose_pages, expand_pages, score_blocks
from lim_kernels.block_gates import GatedBlocks
from lim_kernels.page_bounds import PageBounds
from sgl_lim.gates import GateConfig, GateError, read_config
from sgl_lim.gates.config import DEFAULT_BLOCK
from sgl_lim.methods.base import Budgeted, CombineRanks, Role
from sgl_lim.methods.parameters import Choice, Share, Text, parameter


@dataclass(frozen=True)
class SeerAttention(Budgeted):
    """Every layer chooses whole blocks for each KV head, from the layer on that the gates name."""

    name = "seerattention"

    gates: str | None = parameter(
        None,
        Text("a folder of gates, or the name of one on the hub", metavar="PATH"),
        "Gates of the served checkpoint: a folder with config.json and attn_gate_weights.pth or safetensors, or a name "
        "on the hub",
    )
    gate_threshold: float | None = parameter(
        None,
        Share(metavar="T", inside=True),
        "Read only blocks whose share by the gate is larger than this (default: as many blocks as the budget has)",
    )
    scope: str = parameter("kv_head", Choice(("kv_head",)), "Each KV head has a set")

    @property
    def page(self) -> int:
        """The block size of the gates; that of the published ones where there are none to ask."""
        config = self.gate_config
        return DEFAULT_BLOCK if config is None else config.block

    @property
    def gate_config(self) -> GateConfig | None:
        """What the gates say of themselves; None where `conflicts` says why they cannot."""
        try:
            return None if self.gates is None else read_config(self.gates)
        except GateError:
            return None

    @property
    def per_kv_head(self) -> bool:
        """Always."""
        return True

    @property
    def sizes_vary(self) -> bool:
        """The last block of a row need not be full."""
        return True

    @property
    def sets_differ(self) -> bool:
        """With a threshold."""
        return self.gate_threshold is not None

    def role(self, layer: int) -> Role:
        """Layers before the gates' first one are dense, every other chooses for itself."""
        config = self.gate_config
        return Role.DENSE if config is not None and layer < config.start_layer else Role.OWN

    def choose_own(
        self,
        q: Tensor,
        pages: PageBounds | GatedBlocks,
        slots: Tensor,
        seq_lens: Tensor,
        combine_ranks: CombineRanks | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best blocks and the last one of each row and KV head; a row within the budget keeps all it has."""
        assert isinstance(pages, GatedBlocks) and combine_ranks is None
        size = pages.block
        scores = score_blocks(q, pages, slots, seq_lens, score_beyond=self.budget)
        chosen = choose_pages(scores, seq_lens, page=size, most=self.budget // size, threshold=self.gate_threshold)
        return expand_pages(*chosen, slots, seq_lens, page=size)

    def conflicts(self) -> list[str]:
        """There have to be gates."""
        if self.gates is None:
            return [
                *super().conflicts(),
                f"--lim-method {self.name} chooses by gates that were trained for the checkpoint; name them with "
                "--lim-gates, or take --lim-method quest, which needs none",
            ]
        try:
            read_config(self.gates)
        except GateError as error:
            return [f"--lim-gates {error}"]
        return super().conflicts()
