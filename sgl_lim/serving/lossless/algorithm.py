"""`--speculative-algorithm LESSISMORE`, as SGLang's registry of algorithms takes it."""

from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sgl_lim.serving.lossless import versions
from sgl_lim.settings import drafts
from sgl_lim.settings.config import RefusedConfig
from sgl_lim.settings.refusals import BACKEND


class SelfSpec(CustomSpecAlgo):
    """The target drafts for itself.

    SGLang's scheduler calls three members of every algorithm that its `CustomSpecAlgo` lacks (0.5.17 and 0.5.23, see
    `docs/upstream-custom-spec-algo.md`). They are here.
    """

    create_future_map = SpeculativeAlgorithm.create_future_map

    def need_topk(self) -> bool:
        """Drafts are not relayed from round to round: each drafts its own."""
        return False

    def supports_grammar_overlap(self) -> bool:
        """Grammars are walked along the drafts while the dense pass runs."""
        return True

    def carries_draft_hidden_states(self) -> bool:
        """Nothing but a token is relayed."""
        return False

    def handle_server_args(self, server_args: Any) -> None:
        """Resolve SGLang's flags of speculation. Raises RefusedConfig for those that cannot be."""
        backed_up = not versions.has_draft_pools_of_its_own()
        reasons = drafts.problems(server_args, BACKEND, draft_pool_is_backed_up=backed_up)
        if reasons:
            raise RefusedConfig(reasons)
        steps = drafts.steps_of(server_args)
        server_args.speculative_num_steps = steps
        server_args.speculative_eagle_topk = 1
        server_args.speculative_num_draft_tokens = steps + 1
        if server_args.device == "cpu":
            server_args.disable_overlap_schedule = True


def register() -> None:
    """Make the algorithm known in this process, once."""
    from sglang.srt.speculative.spec_registry import get_spec

    if get_spec(drafts.ALGORITHM) is None:
        SpeculativeAlgorithm.register(drafts.ALGORITHM, supports_overlap=True, spec_class=SelfSpec)(_worker)


def _worker(server_args: Any) -> type:
    from sgl_lim.serving.lossless.worker import SelfSpecWorker

    return SelfSpecWorker
