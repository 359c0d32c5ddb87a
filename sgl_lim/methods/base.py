"""What a selection method is: a frozen dataclass that says what each layer does and turns scores into a set.

Its fields are its parameters, each declared by `parameter`; it has no others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor

from lim_kernels.block_gates import GatedBlocks
from lim_kernels.page_bounds import PageBounds
from lim_kernels.prefix_groups import PrefixGroups
from sgl_lim.methods.parameters import MOST, Whole, parameter, parameters_of


class Role(Enum):
    """What a layer does in a decode step."""

    DENSE = "dense"
    """Attends to the whole context."""
    SELECT = "select"
    """Scores the whole context, chooses the set of the layers after it, and attends as `selection_attends` says."""
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
class Keeping:
    """How sets outlive the step that chose them."""

    interval: int
    """A row selects every so many steps."""
    early: bool
    """Whether the layers before the first selection layer attend to its set of the step before."""


@dataclass(frozen=True)
class HeadsOfRank:
    """Which query heads a rank of a tensor-parallel group has, among all of the model's."""

    first: int
    own: int
    all: int
    sharing: int = 1
    """Ranks that hold the same KV head, each with its part of that head's query heads."""

    @property
    def first_of_kv_head(self) -> int:
        """Place of the first query head among those of its KV head."""
        return self.first % (self.own * self.sharing) if self.sharing > 1 else 0

    def of_kv_head(self, kv_heads: int) -> int:
        """Query heads of a KV head over all ranks, where this rank has so many KV heads."""
        return self.own // kv_heads * self.sharing


CombineRanks = Callable[[Tensor, str], Tensor]
"""Combines scores float32, of one shape, over the ranks that must choose one set, by "max" or "logsumexp"."""


@dataclass(frozen=True)
class Method(ABC):
    """One selection method with its parameters."""

    name: ClassVar[str]

    @property
    def page(self) -> int:
        """Tokens that are chosen together: the budget and the server's page size are multiples of it."""
        return 1

    @property
    def per_kv_head(self) -> bool:
        """Whether each KV head has a set of its own."""
        return False

    @property
    def budget(self) -> int:
        """Tokens in a set, at most; nothing is sparse in rows that are no longer."""
        return MOST

    @property
    def keeping(self) -> Keeping | None:
        """How sets outlive a step; None where they do not."""
        return None

    @property
    def sizes_vary(self) -> bool:
        """Whether a set may have fewer tokens than the budget and the context allow."""
        return False

    @property
    def sets_differ(self) -> bool:
        """Whether sets of layers that choose for themselves may have different sizes in one step."""
        return False

    @property
    def selection_attends(self) -> str:
        """What selection layers attend to: the whole "context", or the "set" that they choose."""
        return "context"

    @property
    def rank_reduction(self) -> str | None:
        """How the scores of tensor-parallel ranks are combined: "max", "logsumexp", or None where they need not be.

        With a set for each KV head this concerns ranks that hold the same one.
        """
        return None

    @property
    def best_suffice(self) -> bool:
        """Whether the tokens that each rank would choose by its own scores decide what all ranks choose together.

        They do where scores combine by maximum and nothing but their order counts. A token that all ranks choose is
        among the best of the rank whose score it has: what is ahead of it there is ahead of it everywhere.
        """
        return False

    # What each layer does

    @abstractmethod
    def role(self, layer: int) -> Role:
        """What `layer` does in a decode step of a request longer than the budget."""

    def layer_roles(self, num_layers: int) -> tuple[Role, ...]:
        """Role of each layer of a model."""
        return tuple(self.role(layer) for layer in range(num_layers))

    # Sets

    def initial_set(self, seq_lens: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
        """The set at the start of a step, before any layer ran, or None if a selection layer has to choose it.

        Args:
            seq_lens: int32 [B]; length: width of the snapshot, at least max(seq_lens).

        Returns:
            positions int32 [B, min(budget, length)] and counts int32 [B], as `lim_kernels.choose_tokens`.
        """
        return None

    def score(
        self,
        logits: Tensor,
        seq_lens: Tensor,
        *,
        lse: Tensor,
        kv_heads: int,
        heads: HeadsOfRank,
        shallow: bool = False,
    ) -> Tensor:
        """Scores float32 [B, L] from logits float32 [B, H, L] and their lse float32 [B, H]; [B, H_kv, L] per KV head.

        Ranks of a tensor-parallel group combine theirs afterwards, as `rank_reduction` says.

        Args:
            shallow: scores may be incomplete, and `deepen` completes them once they are combined.
        """
        raise NotImplementedError(f"method {self.name} has no selection layers")

    @property
    def deepens(self) -> bool:
        """Whether shallow scores are incomplete."""
        return False

    def deepen(self, scores: Tensor, logits: Tensor, seq_lens: Tensor, *, kv_heads: int, heads: HeadsOfRank) -> None:
        """Complete combined scores that were shallow; arguments as `score` had them."""
        raise NotImplementedError(f"method {self.name} has no shallow scores")

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

    def choose_own(
        self,
        q: Tensor,
        pages: PageBounds | GatedBlocks,
        slots: Tensor,
        seq_lens: Tensor,
        combine_ranks: CombineRanks | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sets of a layer that chooses for itself.

        Args:
            q: [B, H, D]; slots: int32 [B, L]; seq_lens: int32 [B].
            pages: what is known of the layer's pages.
            combine_ranks: where other ranks have more query heads of the same KV heads; their scores decide as well.

        Returns:
            KV slots int32 [B, H_kv, K], in order of position, and counts int32 [B, H_kv], as many for every KV head
            of a row and in every layer of a step unless `sets_differ`.
        """
        raise NotImplementedError(f"method {self.name} has no layers that choose for themselves")

    # What it shows and refuses

    def settings(self) -> dict[str, Any]:
        """Parameters by name, as they are in force; builtins only."""
        values = {name: getattr(self, name) for name in parameters_of(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def conflicts(self) -> list[str]:
        """Why these parameters, each right by itself, do not go together; each reason with its flag and a way out."""
        return []

    def device_problems(self, device: str) -> list[str]:
        """Why these parameters cannot be served on a device ("cuda" or "cpu"); reasons as in `conflicts`."""
        return []

    def flags_that_follow_writes(self) -> list[str]:
        """Flags, as typed, that need to see everything that writes KV: what is known of pages is learnt from it."""
        return [] if self.page == 1 else [f"--lim-method {self.name}"]

    @property
    def needs_prefix_groups(self) -> str | None:
        """The flag, as typed, that needs rows which share a prefix to be found; None if none does."""
        return None


@dataclass(frozen=True)
class Budgeted(Method):
    """A method whose sparse layers attend to so many tokens."""

    budget: int = parameter(
        2048,
        Whole(metavar="K", hint="; the paper uses 1024 to 6144", beyond=f"no context has more than {MOST} tokens"),
        "Tokens a sparse layer attends to, per request",
    )

    def conflicts(self) -> list[str]:
        """A set has whole pages."""
        if self.budget % self.page == 0:
            return []
        above = -(-self.budget // self.page) * self.page
        return [
            f"--lim-budget {self.budget}: --lim-method {self.name} chooses pages of {self.page} tokens; "
            f"take a multiple of {self.page}, such as {above}"
        ]


def beside_sinks(budget: int, sinks: int) -> list[str]:
    """The reason why a budget is too small for so many sinks, if it is."""
    if budget > sinks:
        return []
    return [f"--lim-budget {budget} leaves no token beside --lim-sinks {sinks}; raise the budget or lower the sinks"]
