"""What became of drafts."""

from sgl_lim.serving.tally import TALLIED, Tally


def test_rounds_and_drafts_are_told_apart() -> None:
    tally = Tally()
    tally.learn(6, [6, 0, 3])
    tally.learn(0, [0, 0])
    tally.learn(3, [1])
    assert tally.totals() == {
        "draft_rounds": 2,
        "plain_rounds": 1,
        "verifications": 4,
        "drafts_proposed": 21,
        "drafts_accepted": 10,
    }
    assert tally.totals().keys() == TALLIED.keys()
