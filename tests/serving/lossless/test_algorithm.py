"""The algorithm as SGLang's registry has it."""

from types import SimpleNamespace

import pytest
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sgl_lim.serving.lossless.algorithm import SelfSpec, register
from sgl_lim.settings.config import RefusedConfig


@pytest.fixture
def algorithm() -> SelfSpec:
    register()
    register()  # plugins load in every process, and more than once in some
    found = SpeculativeAlgorithm.from_string("lessismore")
    assert isinstance(found, SelfSpec)
    return found


def args(**given: object) -> SimpleNamespace:
    plain: dict[str, object] = dict.fromkeys(
        (
            *("speculative_num_steps", "speculative_num_draft_tokens", "speculative_eagle_topk"),
            *("speculative_draft_model_path", "speculative_draft_attention_backend"),
            *("prefill_attention_backend", "enable_lora", "lora_paths"),
        )
    )
    plain |= {"attention_backend": "lessismore", "disaggregation_mode": "null", "pp_size": 1, "device": "cuda"}
    plain |= {"enable_dp_attention": False, "enable_hierarchical_cache": False, "disable_overlap_schedule": False}
    return SimpleNamespace(**{**plain, **given})


def test_it_has_what_the_scheduler_calls_of_every_algorithm(algorithm: SelfSpec) -> None:
    assert algorithm.need_topk() is False
    assert algorithm.carries_draft_hidden_states() is False
    assert callable(algorithm.create_future_map)
    assert algorithm.supports_overlap and algorithm.supports_grammar_overlap()


def test_flags_are_resolved_to_a_chain(algorithm: SelfSpec) -> None:
    given = args(speculative_num_steps=4)
    algorithm.handle_server_args(given)
    assert (given.speculative_num_steps, given.speculative_eagle_topk, given.speculative_num_draft_tokens) == (4, 1, 5)
    assert given.disable_overlap_schedule is False


def test_a_cpu_has_nothing_to_overlap(algorithm: SelfSpec) -> None:
    given = args(device="cpu")
    algorithm.handle_server_args(given)
    assert given.disable_overlap_schedule is True


def test_all_reasons_are_told_at_once(algorithm: SelfSpec) -> None:
    with pytest.raises(RefusedConfig) as refused:
        algorithm.handle_server_args(args(pp_size=2, speculative_eagle_topk=4))
    assert len(refused.value.reasons) == 2
