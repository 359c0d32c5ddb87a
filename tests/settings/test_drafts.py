"""What the lossless mode makes of SGLang's flags, and what it refuses by name."""

from types import SimpleNamespace
from typing import Any

import pytest

from sgl_lim.settings import drafts

BACKEND = "lessismore"


def args(**given: Any) -> SimpleNamespace:
    plain = {
        "speculative_algorithm": "lessismore",
        "speculative_num_steps": None,
        "speculative_num_draft_tokens": None,
        "speculative_eagle_topk": None,
        "speculative_draft_model_path": None,
        "speculative_draft_attention_backend": None,
        "attention_backend": BACKEND,
        "prefill_attention_backend": None,
        "pp_size": 1,
        "enable_dp_attention": False,
        "disaggregation_mode": "null",
        "enable_hierarchical_cache": False,
        "enable_lora": None,
        "lora_paths": None,
        "enable_mixed_chunk": False,
    }
    return SimpleNamespace(**{**plain, **given})


def problems(**given: Any) -> list[str]:
    return drafts.problems(args(**given), BACKEND, draft_pool_is_backed_up=True)


def test_the_name_is_sglang_s_in_any_case() -> None:
    assert drafts.is_lossless(args())
    assert not drafts.is_lossless(args(speculative_algorithm="EAGLE"))
    assert not drafts.is_lossless(args(speculative_algorithm=None))


@pytest.mark.parametrize(
    ("given", "steps"),
    [({}, drafts.DEFAULT_STEPS), ({"speculative_num_steps": 3}, 3), ({"speculative_num_draft_tokens": 5}, 4)],
)
def test_either_flag_says_how_many_are_drafted(given: dict[str, int], steps: int) -> None:
    assert problems(**given) == []
    assert drafts.steps_of(args(**given)) == steps


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"speculative_num_steps": 0}, "--speculative-num-steps must lie between 1 and 15, got 0"),
        ({"speculative_num_steps": 16}, "got 16"),
        ({"speculative_num_steps": 3, "speculative_num_draft_tokens": 3}, "--speculative-num-draft-tokens 3: 3 steps"),
        ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk 4"),
        ({"speculative_draft_model_path": "small"}, "--speculative-draft-model-path small"),
        ({"speculative_draft_attention_backend": "triton"}, "--speculative-draft-attention-backend triton"),
        ({"attention_backend": None}, "--attention-backend lessismore alone"),
        ({"prefill_attention_backend": "fa3"}, "--attention-backend lessismore alone"),
        ({"pp_size": 2}, "--pp-size 2"),
        ({"enable_dp_attention": True}, "--enable-dp-attention"),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
        ({"enable_watermark": True}, "--enable-watermark"),
        ({"grammar_backend": "outlines"}, "--grammar-backend outlines"),
        ({"enable_return_hidden_states": True}, "--enable-return-hidden-states"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(given: dict[str, Any], reason: str) -> None:
    (found,) = problems(**given)
    assert reason in found and ("leave" in found or "use" in found or "each" in found)


def test_a_release_that_knows_one_pool_backs_it_up_once() -> None:
    assert drafts.problems(args(enable_hierarchical_cache=True), BACKEND, draft_pool_is_backed_up=False) == []


def test_multimodal_models_are_refused() -> None:
    (found,) = drafts.model_problems(SimpleNamespace(is_multimodal=True))
    assert "multimodal" in found and "leave it out" in found
    assert drafts.model_problems(SimpleNamespace(is_multimodal=False)) == []
