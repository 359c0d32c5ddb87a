"""What a selection method is: a frozen dataclass that says what each layer does and turns scores into a set."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor

from lim_kernels.page_bounds import PageBounds
from lim_kernels.prefix_groups import PrefixGroups

PREFIX_SELECTIONS = ("request", "group")
SCOPES = ("global", "kv_head")


class Role(Enum):
    """What a layer does in a decode step."""

    DENSE = "dense"
    """Attends to the whole context."""
    SELECT = "select"
    """Attends to the whole context and chooses the set of the layers after it."""
    SPARSE = "sparse"
    """Attends to the set alone."""
    OWN = "own"
    """Chooses a set of its own and attends to it alone."""


@dataclass(frozen=True)
class SharedSets:
    """Which rows of a step choose the same tokens of the prefix that they share."""

    groups: PrefixGroups
    """Rows that choose together, by position."""
    in_sets: PrefixGroups
    """The same rows by place in their sets: where those are equal."""
    counts: Tensor
    """int32 [B], tokens in each row's set."""


@dataclass(frozen=True)
class Method(ABC):
    """One selection method with its parameters.

    Attributes:
        budget: tokens in a set, at most.
        recency: share of the budget for recent tokens.
        sinks: leading tokens always kept.
        aggregate: how heads agree, where the method ranks tokens.
        selection_layers: increasing layer indices; layers before the first are dense.
        prefix_selection: "request", each row chooses for itself; "group", rows that share a prefix choose it together.
        scope: "global", one set for all heads; "kv_head", one for each KV head, ranked over its query heads.
        top_p: share of the attention that a set is to hold, with as few tokens as do; None: it has the whole budget.
        top_p_floor: tokens in such a set, at least.
        auto_recency: the window gets the share of the budget that it holds of the attention, `recency` at most.
    """

    name: ClassVar[str]
    scopes: ClassVar[tuple[str, ...]] = ("global",)
    """Scopes that the method has, its default first."""
    page: ClassVar[int] = 1
    """Tokens that are chosen together: the budget and the server's page size are multiples of it."""
    has_selection_layers: ClassVar[bool] = True
    """Whether `selection_layers` mean anything to the method."""
    rank_reduction: ClassVar[dict[str, str]] = {"union": "max", "max": "max", "sum": "logsumexp"}

    budget: int
    recency: float
    sinks: int
    aggregate: str
    selection_layers: tuple[int, ...]
    prefix_selection: str = "request"
    scope: str = "global"
    top_p: float | None = None
    top_p_floor: int = 1
    auto_recency: bool = False

    @property
    def per_kv_head(self) -> bool:
        """Whether each KV head has a set of its own."""
        return self.scope == "kv_head"

    @property
    def kept_sinks(self) -> int:
        """Leading tokens that every set has."""
        return self.sinks

    @abstractmethod
    def role(self, layer: int) -> Role:
        """What `layer` does in a decode step of a request longer than the budget."""

    def initial_set(self, seq_lens: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
        """The set at the start of a step, before any layer ran, or None if a selection layer has to choose it.

        Args:
            seq_lens: int32 [B]; length: width of the snapshot, at least max(seq_lens).

        Returns:
            positions int32 [B, min(budget, length)] and counts int32 [B], as `lim_kernels.choose_tokens`.
        """
        return None

    def score(
        self, logits: Tensor, seq_lens: Tensor, *, lse: Tensor, kv_heads: int, first_head: int, num_heads: int
    ) -> Tensor:
        """Scores float32 [B, L] from logits float32 [B, H, L] and their lse float32 [B, H]; [B, H_kv, L] per KV head.

        Ranks of a tensor-parallel group combine theirs afterwards, unless each KV head has its own set.
        """
        raise NotImplementedError(f"method {self.name} has no selection layers")

    def share_sets(self, slots: Tensor, seq_lens: Tensor, granule: int) -> SharedSets | None:
        """The rows that choose together in this step, or None if each chooses for itself.

        Args:
            slots: int32 [B, L]; seq_lens: int32 [B].
            granule: shared prefixes are found in multiples of so many tokens.
        """
        return None

    def choose(
        self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None, shared: SharedSets | None = None
    ) -> tuple[Tensor, Tensor]:
        """The set from combined scores, in KV slots (or positions) int32 [B, K], and counts, as `choose_tokens`.

        Per KV head: [B, H_kv, L] to [B, H_kv, K] and [B, H_kv].

        Args:
            shared: of these rows, by `share_sets`.
        """
        raise NotImplementedError(f"method {self.name} has no selection layers")

    def choose_own(self, q: Tensor, bounds: PageBounds, slots: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """The sets of a layer that chooses for itself.

        Args:
            q: [B, H, D]; bounds: of the layer's pages; slots: int32 [B, L]; seq_lens: int32 [B].

        Returns:
            KV slots int32 [B, H_kv, K], in order of position, and counts int32 [B, H_kv], as many for every KV head
            of a row and in every layer of a step.
        """
        raise NotImplementedError(f"method {self.name} has no layers that choose for themselves")

    def layer_roles(self, num_layers: int) -> tuple[Role, ...]:
        """Role of each layer of a model."""
        return tuple(self.role(layer) for layer in range(num_layers))
