"""How many tokens a round drafts: what is measured decides, and what was accepted."""

import pytest

from sgl_lim.serving.lossless.cost import PRIOR, Acceptance, Chooser, Measured, PassCost, RoundCosts, rising, tokens_of


def flat(fixed: float, per_token: float = 0.0) -> PassCost:
    points = ((0.0, fixed), (1e6, fixed + 1e6 * per_token))
    return PassCost((Measured(1, points), Measured(16, points)))


def costs(draft: float, plain_a_token: float) -> RoundCosts:
    """A dense pass costs 5 and what its context does; verification no more."""
    dense = flat(5.0, plain_a_token)
    return RoundCosts(draft=flat(draft), plain=dense, verify={3: dense, 6: dense})


def accepting(share: float) -> Acceptance:
    return Acceptance(share * 1000, 1000)


def test_between_lengths_costs_lie_on_lines() -> None:
    cost = Measured(4, ((100, 2.0), (1000, 3.0), (2000, 3.5)))
    assert [cost.at(tokens) for tokens in (0, 100, 550, 1000, 1500, 4000)] == pytest.approx(
        [2.0, 2.0, 2.5, 3.0, 3.25, 4.5]
    )
    assert Measured(4, ((100, 2.0),)).at(5000) == 2.0


def test_a_longer_context_costs_no_less() -> None:
    assert rising(4, [(10, 2.0), (20, 1.9), (30, 2.5)]) == Measured(4, ((10, 2.0), (20, 2.0), (30, 2.5)))


def test_between_batch_sizes_costs_lie_between() -> None:
    cost = PassCost((Measured(4, ((0, 1.0),)), Measured(16, ((0, 4.0),))))
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
        assert rounds < 20_000
    assert rounds > 100


def test_where_no_draft_is_accepted_few_rounds_try() -> None:
    chooser = Chooser([3, 6], costs(draft=5.0, plain_a_token=1e-4))
    tried = []
    for _ in range(20_000):
        tried.append(chooser.choose(8, 100_000))
        if tried[-1]:
            chooser.acceptance.learn([0] * 8, tried[-1])
    assert 0 < sum(map(bool, tried[-10_000:])) < 200


def test_acceptance_counts_drafts_up_to_the_first_that_was_rejected() -> None:
    acceptance = Acceptance(0.0, 0.0)
    acceptance.learn([6, 2, 0], 6)
    assert (acceptance.accepted, acceptance.tried) == (8, 6 + 3 + 1)


def test_acceptance_forgets() -> None:
    acceptance = accepting(1.0)
    for _ in range(2000):
        acceptance.learn([0] * 8, 6)
    assert acceptance.share < 0.01
    for _ in range(80_000):
        acceptance.fade()
    assert acceptance.share == pytest.approx(PRIOR, abs=0.01)


def test_a_round_answers_one_token_more_than_it_accepts() -> None:
    assert tokens_of(0, 0.9) == 1
    assert tokens_of(3, 1.0) == 4
    assert tokens_of(2, 0.5) == pytest.approx(1.75)
