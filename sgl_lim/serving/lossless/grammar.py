"""Grammars over a run: what is allowed at each place after the drafts before it.

A grammar is advanced on the host. So the drafts are copied there while the dense pass runs, SGLang's own code walks
each request's grammar along them and back, and the masks go to the device. A draft that the grammar forbids cannot be
accepted, so places after it need no mask.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask
from torch import Tensor

from sgl_lim.serving.lossless.distributions import TokenMask


class RunGrammar:
    """Grammars of one round's requests.

    Args:
        batch: SGLang's ScheduleBatch.
        run: int64 [B, k + 1], the token that a round begins with and its drafts. Copying them to the host begins at
            once, so make this before the dense pass is launched.
    """

    def __init__(self, batch: Any, run: Tensor) -> None:
        self._batch, self._device = batch, run.device
        self._chain = GrammarTree.from_linear_chain(run)

    def mask(self, barrier: Callable[[], None] | None) -> TokenMask | None:
        """The mask of all B * (k + 1) places; None without a grammar. It waits for the drafts.

        Args:
            barrier: SGLang's, which advances the grammars by what the round before has answered.
        """
        return build_grammar_vocab_mask(
            reqs=self._batch.reqs,
            tree=self._chain,
            sampling_info=self._batch.sampling_info,
            device=self._device,
            barrier=barrier,
        )
