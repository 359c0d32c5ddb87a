"""What rounds hand to one another, and the batches that they run."""

from types import SimpleNamespace

import pytest
import torch

from sgl_lim.serving.lossless.rounds import DraftInput, decode_batch, rows_of, verify_batch


def batch_of(lens: list[int], rows: list[int], *, on_host: bool) -> SimpleNamespace:
    reqs = [SimpleNamespace(kv_committed_len=n, kv=SimpleNamespace(kv_allocated_len=n + 2 * 4)) for n in lens]
    return SimpleNamespace(
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=torch.tensor(lens) if on_host else None,
        req_pool_indices=torch.tensor(rows),
        reqs=reqs,
    )


@pytest.fixture
def table() -> torch.Tensor:
    return torch.arange(5 * 40, dtype=torch.int32).view(5, 40)


def test_drafts_and_verification_take_the_same_slots(table: torch.Tensor) -> None:
    rows = rows_of(batch_of([10, 20], [3, 1], on_host=True), table, drafts=3, most=3)
    assert rows.slots.tolist() == [[130, 131, 132, 133], [60, 61, 62, 63]]
    step = decode_batch(rows, torch.tensor([7, 8]), 2)
    assert step.out_cache_loc.tolist() == [132, 62]
    assert (step.positions.tolist(), step.seq_lens.tolist()) == ([12, 22], [13, 23])
    assert step.seq_lens_cpu.tolist() == [13, 23]
    verification = verify_batch(rows, torch.tensor([[7, 1, 2, 3], [8, 4, 5, 6]]))
    assert verification.out_cache_loc.tolist() == rows.slots.flatten().tolist()
    assert verification.positions.tolist() == [10, 11, 12, 13, 20, 21, 22, 23]
    assert verification.seq_lens.tolist() == [10, 20]
    assert verification.spec_info.draft_token_num == 4


def test_lengths_that_the_host_does_not_know_are_bounded(table: torch.Tensor) -> None:
    batch = batch_of([10, 20], [3, 1], on_host=False)
    # The host is a round behind, in which all drafts were accepted.
    batch.seq_lens += 4
    rows = rows_of(batch, table, drafts=2, most=3)
    assert (rows.lens_cpu >= rows.lens).all()
    assert rows.lens_cpu.tolist() == [14, 24]


def test_fewer_drafts_take_the_first_slots(table: torch.Tensor) -> None:
    rows = rows_of(batch_of([10], [2], on_host=True), table, drafts=3, most=3).first(1)
    assert rows.slots.tolist() == [[90, 91]] and rows.positions.tolist() == [[10, 11]]


def test_requests_that_leave_and_join_keep_their_tokens() -> None:
    mine, other = DraftInput(torch.tensor([5, 6, 7])), DraftInput(torch.tensor([9]))
    mine.filter_batch(torch.tensor([2, 0]), new_indices_cpu=[2, 0])
    mine.merge_batch(other)
    assert mine.bonus_tokens.tolist() == [7, 5, 9]


def test_under_overlap_the_rows_are_what_counts() -> None:
    mine, other = DraftInput(torch.tensor([5, 6])), DraftInput(torch.tensor([9]))
    mine.future_indices, other.future_indices = torch.tensor([3, 1]), torch.tensor([2])
    mine.filter_batch(torch.tensor([1]))
    mine.merge_batch(other)
    assert mine.future_indices.tolist() == [1, 2]
