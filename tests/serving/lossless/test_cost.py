"""How many tokens a round drafts: what is measured decides, and what was accepted."""

import pytest

from sgl_lim.serving.lossless.cost import PRIOR, Acceptance, Chooser, Measured, PassCost, RoundCosts, fitted, tokens_of


def flat(fixed: float, per_token: float = 0.0) -> PassCost:
    return PassCost((Measured(1, fixed, per_token), Measured(16, fixed, per_token)))


def costs(draft: float, plain_a_token: float) -> RoundCosts:
    """A dense pass costs 5 and what its context does; verification no more."""
    dense = flat(5.0, plain_a_token)
    return RoundCosts(draft=flat(draft), plain=dense, verify={3: dense, 6: dense})


def accepting(share: float) -> Acceptance:
    return Acceptance(share * 1000, 1000)


def test_two_measurements_make_a_line() -> None:
    cost = fitted(4, (256, 2.0), (1280, 3.0))
    assert cost.at(256) == pytest.approx(2.0)
    assert cost.at(1280) == pytest.approx(3.0)
    assert fitted(4, (256, 2.0), (1280, 1.9)).per_token == 0, "a longer context costs no less"


def test_between_batch_sizes_costs_lie_between() -> None:
    cost = PassCost((Measured(4, 1.0, 0.0), Measured(16, 4.0, 0.0)))
    assert [cost.seconds(rows, 0) for rows in (1, 4, 10, 16, 32)] == pytest.approx([1.0, 1.0, 2.5, 4.0, 8.0])


@pytest.mark.parametrize(
    ("share", "tokens", "drafts"),
    [
        pytest.param(0.9, 100_000, 6, id="long-and-accepted"),
        pytest.param(0.6, 100_000, 3, id="long-and-half-accepted"),
        pytest.param(0.9, 100, 0, id="short"),
        pytest.param(0.0, 100_000, 0, id="never-accepted"),
    ],
)
def test_what_wins_is_chosen(share: float, tokens: int, drafts: int) -> None:
    chooser = Chooser([3, 6], costs(draft=5.0, plain_a_token=1e-4), accepting(share))
    assert chooser.choose(8, tokens) == drafts


def test_without_costs_every_round_drafts() -> None:
    assert Chooser([6]).choose(1, 1) == 6


def test_a_batch_whose_logits_do_not_fit_does_not_draft() -> None:
    assert [Chooser([6], most_rows=8).choose(rows, 1) for rows in (8, 9)] == [6, 0]


def test_drafting_is_tried_again_after_it_did_not_pay() -> None:
    chooser = Chooser([3, 6], costs(draft=5.0, plain_a_token=1e-4), accepting(0.0))
    rounds = 0
    while chooser.choose(8, 100_000) == 0:
        rounds += 1
        assert rounds < 2000
    assert rounds > 100


def test_acceptance_counts_drafts_up_to_the_first_that_was_rejected() -> None:
    acceptance = Acceptance(0.0, 0.0)
    acceptance.learn([6, 2, 0], 6)
    assert (acceptance.accepted, acceptance.tried) == (8, 6 + 3 + 1)


def test_acceptance_forgets() -> None:
    acceptance = accepting(1.0)
    for _ in range(2000):
        acceptance.learn([0] * 8, 6)
    assert acceptance.share < 0.01
    for _ in range(5000):
        acceptance.fade()
    assert acceptance.share == pytest.approx(PRIOR, abs=0.01)


def test_a_round_answers_one_token_more_than_it_accepts() -> None:
    assert tokens_of(0, 0.9) == 1
    assert tokens_of(3, 1.0) == 4
    assert tokens_of(2, 0.5) == pytest.approx(1.75)
