"""Lists of each head's best candidates in Triton, of which the union is made.

They are found by a guess from a sample of the row, and by a search where the guess missed.
"""

import triton
import triton.language as tl

from lim_kernels.select_tokens.triton_tiles import number_kept, tile


@triton.jit
def to_key(values):
    """int32 in the order of float32 values, -0.0 as 0.0; its own inverse on bits."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def to_value(key):
    """The float32 whose `to_key` is `key`."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(logits_row, width, start, first, last, BLOCK: tl.constexpr):
    """A block's positions and logits as a tile, NaN (which reaches no bound) outside the candidates.

    A candidate that is no number counts as -inf, so that every candidate reaches the lowest bound and a search ends.
    """
    positions = start + tile(BLOCK)
    logits = tl.load(logits_row + positions, mask=positions < width, other=0.0)
    logits = tl.where(logits == logits, logits, -float("inf"))
    return positions, tl.where((positions >= first) & (positions < last), logits, float("nan"))


@triton.jit
def sample_key(keys, wanted, slack):
    """A key that `wanted` of the sampled keys reach, within `slack` if any does."""
    low = tl.min(tl.where(keys == -2147483648, 2147483647, keys), axis=0).to(tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0)
        if reached >= wanted - slack:
            low = middle
        if reached <= wanted + slack:
            high = tl.where(reached >= wanted - slack, middle + 1, middle)
    return low


@triton.jit
def load_sample(logits_row, first, last, SAMPLE: tl.constexpr):
    """Keys of at most SAMPLE candidates at equal distances, and that distance."""
    step = tl.cdiv(last - first, SAMPLE)
    positions = first + tl.arange(0, SAMPLE) * step
    values = tl.load(logits_row + positions, mask=positions < last, other=0.0)
    values = tl.where(values == values, values, -float("inf"))
    return tl.where(positions < last, to_key(values), -2147483648), step


@triton.jit
def guess_kernel(
    logits_ptr,
    lens_ptr,
    guesses_ptr,
    reached_ptr,
    pending_ptr,
    scores_ptr,
    budget,
    recent,
    sinks,
    depth,
    stride_row,
    stride_head,
    stride_scores,
    HEADS: tl.constexpr,
    TOP: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Guess from a sample of the row a key that between `depth` and TOP of a head's candidates reach.

    AGAIN corrects a guess that missed by how many it let through, and marks the head as pending. The first time, the
    programs of a row also mark all of its tokens as unlisted.
    """
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if length <= budget:
        return
    if not AGAIN:
        for start in range(tl.program_id(0) * BLOCK, length, HEADS * BLOCK):
            positions = start + tl.arange(0, BLOCK)
            unlisted = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
            tl.store(scores_ptr + row * stride_scores + positions, unlisted, mask=positions < length)
    place = row * HEADS + head
    aim = (depth + TOP) // 2
    if AGAIN:
        there = tl.load(reached_ptr + place)
        hit = (there >= depth) & (there <= TOP)
        tl.store(pending_ptr + place, 1 - hit.to(tl.int32))
        if hit:
            return
    logits_row = logits_ptr + row * stride_row + head * stride_head
    sample, step = load_sample(logits_row, sinks, length - recent, SAMPLE)
    if AGAIN:
        missed = to_key(tl.load(guesses_ptr + place))
        sampled = tl.sum((sample >= missed).to(tl.int32), axis=0)
        wanted = (sampled * aim) // tl.maximum(there, 1)
        wanted = tl.where(there < depth, tl.maximum(wanted, sampled + 1), tl.minimum(wanted, sampled - 1))
        tl.store(reached_ptr + place, 0)
        slack = 0
    else:
        wanted = aim // step
        slack = wanted // 16
    wanted = tl.minimum(tl.maximum(wanted, 1), SAMPLE)
    tl.store(guesses_ptr + place, to_value(sample_key(sample, wanted, slack)))


@triton.jit
def gather_kernel(
    logits_ptr,
    lens_ptr,
    guesses_ptr,
    reached_ptr,
    pending_ptr,
    scratch_ptr,
    width,
    budget,
    recent,
    sinks,
    stride_row,
    stride_head,
    HEADS: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """List a head's candidates that reach the guess, in any order, and count them. AGAIN: of pending heads only."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    last = length - recent
    if length <= budget:
        return
    place = row * HEADS + head
    if AGAIN and tl.load(pending_ptr + place) == 0:
        return
    bound = tl.load(guesses_ptr + place)
    logits_row = logits_ptr + row * stride_row + head * stride_head
    for start in range(tl.program_id(0) * BLOCK, last, tl.num_programs(0) * BLOCK):
        positions, logits = load_logits(logits_row, width, start, sinks, last, BLOCK)
        kept = logits >= bound
        count, places = number_kept(kept)
        if count > 0:
            places += tl.atomic_add(reached_ptr + place, count, sem="relaxed")
            tl.store(scratch_ptr + place * TOP + places, positions, mask=kept & (places < TOP))


@triton.jit
def gather_above(logits_row, width, scratch, key, ties, first, last, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """List the candidates above `key`, and the first `ties` of those equal to it; returns how many reach `key`.

    At most TOP are listed; their number comes second.
    """
    bound = to_value(key)
    written = 0
    reached = 0
    tied = 0
    for start in range(0, last, BLOCK):
        positions, logits = load_logits(logits_row, width, start, first, last, BLOCK)
        kept = logits >= bound
        count, places = number_kept(kept)
        reached += count
        if ties < TOP:
            equal, order = number_kept(logits == bound)
            kept = kept & ((logits > bound) | (tied + order < ties))
            tied += equal
            count, places = number_kept(kept)
        places += written
        tl.store(scratch + places, positions, mask=kept & (places < TOP))
        written += count
    return reached, written


@triton.jit
def search_kernel(
    logits_ptr,
    lens_ptr,
    scratch_ptr,
    reached_ptr,
    listed_ptr,
    width,
    budget,
    recent,
    sinks,
    depth,
    stride_row,
    stride_head,
    HEADS: tl.constexpr,
    TOP: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
):
    """List the `depth` best or more of one head and row, at most TOP, where no list is there that will do."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if length <= budget:
        return
    place = row * HEADS + head
    if DEEP:
        if tl.load(listed_ptr + row) >= budget - recent - sinks:
            return
    else:
        there = tl.load(reached_ptr + place)
        if (there >= depth) & (there <= TOP):
            return
    first = sinks
    last = length - recent
    logits_row = logits_ptr + row * stride_row + head * stride_head
    scratch = scratch_ptr + place * TOP
    # A first guess from a sample, which aims at the middle of what will do: from `depth` to TOP listed.
    sample, step = load_sample(logits_row, first, last, SAMPLE)
    aim = (depth + TOP) // 2
    guess = sample_key(sample, tl.maximum(aim // step, 1), 0)

    # Bisection of keys. At least `depth` keys are >= low, which is the key of -inf first, and fewer are >= high: when
    # the two are neighbours, `low` is the depth-th key. Each turn overwrites the list of the one before.
    low = tl.full([], -2139095041, dtype=tl.int64)
    high = tl.full([], 2147483648, dtype=tl.int64)
    written = 0
    tries = 0
    while written == 0:
        # TOP ties are as many as the list has room for: everything that reaches the guess is listed, or too much is.
        reached, _written = gather_above(logits_row, width, scratch, guess, TOP, first, last, TOP, BLOCK)
        if reached < depth:
            high = guess
        else:
            low = guess
        if (reached >= depth) & (reached <= TOP):
            written = reached
        elif high - low <= 1:
            # `low` is the depth-th key, and too many are equal to it: they go by position.
            above, _written = gather_above(logits_row, width, scratch, high, TOP, first, last, TOP, BLOCK)
            above = tl.where(high == 2147483648, 0, above)
            _reached, written = gather_above(logits_row, width, scratch, low, depth - above, first, last, TOP, BLOCK)
        else:
            guess = low + (high - low) // 2
            tries += 1
            # The first times the sample gives a better guess, corrected by how far the last one missed. It might not
            # end where many logits are equal, so bisection takes over.
            if tries <= 4:
                aim = tl.maximum((aim * ((depth + TOP) // 2)) // tl.maximum(reached, 1), 1)
                again = sample_key(sample, tl.minimum(tl.maximum(aim // step, 1), SAMPLE), 0)
                guess = tl.where((again > low) & (again < high), again, guess)
        # The next pass overwrites what this one listed.
        tl.debug_barrier()
    tl.store(reached_ptr + place, written)
