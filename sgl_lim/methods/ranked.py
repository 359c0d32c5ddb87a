"""What methods share that rank tokens at selection layers, and whose other layers attend to what was chosen there."""

from dataclasses import dataclass

from torch import Tensor

from lim_kernels import SetSizes, adapt_budgets, choose_tokens, deepen_scores, score_tokens
from lim_kernels.select_tokens import AGGREGATES, MAX_UNION
from sgl_lim.methods.base import Budgeted, HeadsOfRank, Role, SharedSets
from sgl_lim.methods.parameters import Choice, Share, Whole, parameter
from sgl_lim.methods.selection_layers import selection_layers_parameter

_UNWEIGHED = "weighs no tokens"


@dataclass(frozen=True)
class Ranked(Budgeted):
    """A set is what ranks best, for all heads or for each KV head; subclasses may keep sinks and a window beside."""

    aggregate: str = parameter("union", Choice(AGGREGATES), "How heads agree on one set")
    selection_layers: tuple[int, ...] = selection_layers_parameter()
    selection_attends: str = parameter(
        "context",
        Choice(("context", "set")),
        "What selection layers attend to: all of the context, as in the paper, or the set that they choose, so that "
        "they read no other values",
        missing="has no layer that scores tokens",
    )
    top_p: float | None = parameter(
        None,
        Share(metavar="P", inside=True, hint="; leave it out for whole budgets"),
        "Sets have no more tokens than hold this share of the attention (default: always the whole budget)",
        missing=_UNWEIGHED,
    )
    top_p_floor: int | None = parameter(
        None,
        Whole(),
        "Tokens that sets have at least with --lim-top-p (default: an eighth of the budget)",
        missing=_UNWEIGHED,
    )

    @property
    def sizes(self) -> SetSizes:
        """Budget, recency window and sinks of a set."""
        return SetSizes(budget=self.budget, recent=0, sinks=0)

    @property
    def window_varies(self) -> bool:
        """Whether each set finds its window's length, up to that in `sizes`."""
        return False

    @property
    def sizes_vary(self) -> bool:
        """With `top_p` sets have as few tokens as hold the share."""
        return self.top_p is not None

    @property
    def floor(self) -> int:
        """Tokens in a set at least, with `top_p`."""
        return max(1, self.budget // 8) if self.top_p_floor is None else self.top_p_floor

    @property
    def rank_reduction(self) -> str | None:
        """Places in the union and largest weights combine by maximum, sums of weights by their sum."""
        return "logsumexp" if self.aggregate == "sum" else "max"

    def role(self, layer: int) -> Role:
        """Selection layers choose, layers before the first are dense, all others are sparse."""
        if layer in self.selection_layers:
            return Role.SELECT
        return Role.DENSE if layer < self.selection_layers[0] else Role.SPARSE

    @property
    def best_suffice(self) -> bool:
        """Where all budgets are the same: how many tokens hold a share of the attention, all of their weights tell."""
        return self.rank_reduction == "max" and not self.sizes_vary and not self.window_varies

    @property
    def deepens(self) -> bool:
        """Lists of the union are as deep as all heads together need."""
        return self.aggregate == "union"

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
        """See `lim_kernels.score_tokens`; KV heads are ranked as if each were a row of its own."""
        first_head, num_heads = self._owners(kv_heads, heads)
        scores = score_tokens(
            self._lines(logits, kv_heads),
            self._lens_of_lines(seq_lens, kv_heads),
            self.sizes,
            aggregate=self.aggregate,
            first_head=first_head,
            num_heads=num_heads,
            lse=self._lines(lse, kv_heads),
            shallow=shallow,
        )
        return scores.unflatten(0, (len(seq_lens), kv_heads)) if self.per_kv_head else scores

    def deepen(self, scores: Tensor, logits: Tensor, seq_lens: Tensor, *, kv_heads: int, heads: HeadsOfRank) -> None:
        """See `lim_kernels.deepen_scores`."""
        lines = scores.flatten(0, 1) if self.per_kv_head else scores
        first_head, num_heads = self._owners(kv_heads, heads)
        logits, lens = self._lines(logits, kv_heads), self._lens_of_lines(seq_lens, kv_heads)
        deepen_scores(lines, logits, lens, self.sizes, first_head=first_head, num_heads=num_heads)

    def _lines(self, of_heads: Tensor, kv_heads: int) -> Tensor:
        """[B, H, …] as what is ranked together: that, or per KV head a view [B * H_kv, H / H_kv, …]."""
        return of_heads.unflatten(1, (kv_heads, -1)).flatten(0, 1) if self.per_kv_head else of_heads

    def _lens_of_lines(self, seq_lens: Tensor, kv_heads: int) -> Tensor:
        return seq_lens.repeat_interleave(kv_heads) if self.per_kv_head else seq_lens

    def _owners(self, kv_heads: int, heads: HeadsOfRank) -> tuple[int, int]:
        """Of the query heads that are ranked together: which is this rank's first, and how many all ranks have."""
        if self.per_kv_head:
            return heads.first_of_kv_head, heads.of_kv_head(kv_heads)
        return heads.first, heads.all

    def choose(
        self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None, shared: SharedSets | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `lim_kernels.choose_tokens`."""
        if not self.per_kv_head:
            return self._choose_rows(scores, seq_lens, slots)
        batch, kv_heads, length = scores.shape
        chosen, counts = (
            tensor.unflatten(0, (batch, kv_heads))
            for tensor in self._choose_rows(scores.flatten(0, 1), seq_lens.repeat_interleave(kv_heads), None)
        )
        if slots is None:
            return chosen, counts
        # No head has more tokens than the snapshot is wide, and a budget may be much wider.
        positions = chosen[:, :, :length].clamp(min=0).long()
        return slots.unsqueeze(1).expand(-1, kv_heads, -1).gather(2, positions), counts

    def _choose_rows(self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """The set of each row of scores [R, L]."""
        budgets, recents = None, None
        if self.sizes_vary or self.window_varies:
            budgets, recents = adapt_budgets(
                scores,
                seq_lens,
                self.sizes,
                find_recent=self.window_varies,
                top_p=self.top_p,
                floor=self.floor if self.sizes_vary else 1,
            )
        return choose_tokens(scores, seq_lens, self.sizes, slots=slots, budgets=budgets, recents=recents)

    def settings(self) -> dict[str, object]:
        """The floor in force, if there is one."""
        return {**super().settings(), "top_p_floor": self.floor if self.sizes_vary else None}

    def conflicts(self) -> list[str]:
        """What sizes that follow the attention cannot be combined with."""
        found = super().conflicts()
        if self.aggregate == "union":
            reason = "needs the weights of tokens, and --lim-aggregate union ranks by place; take sum or max"
            found += [f"{flag} {reason}" for flag in self._adaptive_flags()]
        if self.top_p_floor is not None:
            if self.top_p_floor > self.budget:
                found.append(f"--lim-top-p-floor {self.top_p_floor} exceeds --lim-budget {self.budget}; lower it")
            if self.top_p is None:
                found.append("--lim-top-p-floor does nothing without --lim-top-p; leave it out")
        return found

    def device_problems(self, device: str) -> list[str]:
        """The kernel of the union has a largest budget."""
        if device != "cuda" or self.aggregate != "union" or self.budget <= MAX_UNION:
            return []
        return [
            f"--lim-budget {self.budget} is more than union ranks on a GPU; use at most {MAX_UNION}, or "
            "--lim-aggregate max"
        ]

    def _adaptive_flags(self) -> list[str]:
        """Flags, as typed, by which sizes follow the attention."""
        flags = [] if self.top_p is None else [f"--lim-top-p {self.top_p}"]
        return flags + ["--lim-recency auto"] * self.window_varies
