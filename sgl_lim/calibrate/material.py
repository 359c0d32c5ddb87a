"""What a calibration decodes: items that the package makes, and the user's prompts, some of them held out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sgl_lim.calibrate import languages, needles
from sgl_lim.evaluate import sources
from sgl_lim.evaluate.checkpoint import Checkpoint
from sgl_lim.evaluate.items import Item, ItemError, Suite, chain_suite, text_suite
from sgl_lim.evaluate.items import Sizes as ItemSizes

PARTS = ("quick", "search", "held out")
"""Every candidate is tried on the first, good ones on the second; the last says what was chosen."""
_UNKNOWN = 0.1
"""Share of unknown tokens beyond which a tokenizer does not know a text."""
_STEPS = 16
_EASY, _EASY_SHARE = 2, 4
"""Short chains, and the share of the context that they take."""
_A_FACT = "v17 -> v203 + 4 ;"


@dataclass(frozen=True)
class Counts:
    """Items of one part."""

    windows: int  # of English, and of Python
    others: int  # of other languages
    facts: int  # texts with five different facts
    alike: int  # texts with four facts of one kind
    chains: int


@dataclass(frozen=True)
class Sizes:
    """How much is decoded."""

    context: int
    decoded: int  # of a window of text
    seed: int
    counts: tuple[Counts, Counts, Counts]  # by part


def built_in(checkpoint: Checkpoint, sizes: Sizes, *, chains: bool) -> list[list[Suite]]:
    """Suites by part: text, needles and chains, as far as the tokenizer knows their words.

    Args:
        chains: whether the model can do any.

    Raises:
        ItemError: the tokenizer knows none of them, or the context has no room.
    """
    made = [*_texts(checkpoint, sizes), *(_chains(checkpoint, sizes) if chains else ())]
    parts = [[by_part[n] for by_part in made if by_part[n].items] for n in range(len(PARTS))]
    for part, counts, name in zip(parts, sizes.counts, PARTS, strict=True):
        part += _needles(checkpoint, sizes, counts, name)
    if not parts[0]:
        raise ItemError("the tokenizer knows neither text nor needles nor chains; nothing can be decoded")
    return parts


def easy_chains(checkpoint: Checkpoint, sizes: Sizes) -> Suite | None:
    """Short chains, which tell whether a model does any at all; None where its tokenizer does not know their words."""
    if not _knows(checkpoint, _A_FACT):
        return None
    easy = ItemSizes(_EASY, sizes.context // _EASY_SHARE, 0, steps=4, facts=None, seed=sizes.seed)
    return chain_suite(checkpoint, easy)


def with_prompts(parts: Sequence[Sequence[Suite]], items: Sequence[Item]) -> list[list[Suite]]:
    """The parts with the user's items too: of six in order, one is quick, two are searched on, three held out."""
    if not items:
        return [list(part) for part in parts]
    turns = [[item for n, item in enumerate(items) if n % 6 in places] for places in ((0,), (2, 4), (1, 3, 5))]
    # What is held out has to be there, and so has what is searched on.
    turns = [turn or list(items[-1:]) for turn in turns]
    return [[*part, Suite("your prompts", "text", tuple(turn))] for part, turn in zip(parts, turns, strict=True)]


def _texts(checkpoint: Checkpoint, sizes: Sizes) -> list[list[Suite]]:
    """By kind of text, one suite a part."""
    windows = [counts.windows for counts in sizes.counts]
    others = [counts.others for counts in sizes.counts]
    found = []
    for name, texts, wanted in (
        ("english", sources.english(), windows),
        ("python", sources.python(), windows),
        # A sentence has ten tokens or more.
        ("other languages", languages.texts(str(sizes.seed), 1 + sum(others) * sizes.context // 100), others),
    ):
        if sum(wanted) and _knows(checkpoint, texts[0]):
            suite = text_suite(checkpoint, name, texts, _item_sizes(sizes, sum(wanted)))
            found.append(_cut(suite, wanted))
    return found


def _needles(checkpoint: Checkpoint, sizes: Sizes, counts: Counts, part: str) -> list[Suite]:
    if not _knows(checkpoint, "The access code of the silver lantern is written in words."):
        return []
    seed = f"{sizes.seed}/{part}"
    kinds = (("facts", needles.different_kinds, counts.facts), ("facts alike", needles.one_kind, counts.alike))
    return [
        needles.needle_suite(checkpoint, name, hide, texts=texts, context=sizes.context, seed=seed)
        for name, hide, texts in kinds
        if texts
    ]


def _chains(checkpoint: Checkpoint, sizes: Sizes) -> list[list[Suite]]:
    wanted = [counts.chains for counts in sizes.counts]
    if not sum(wanted):
        return []
    suite = chain_suite(checkpoint, _item_sizes(sizes, sum(wanted)))
    return [_cut(suite, wanted)]


def _item_sizes(sizes: Sizes, items: int) -> ItemSizes:
    return ItemSizes(items, sizes.context, sizes.decoded, steps=_STEPS, facts=None, seed=sizes.seed)


def _cut(suite: Suite, wanted: Sequence[int]) -> list[Suite]:
    """So many items for each part, in order; of a text that is too short for all, a share of them."""
    if len(suite.items) < sum(map(bool, wanted)):
        raise ItemError(f"{suite.name}: there are {len(suite.items)} windows, less than parts; lower --context")
    # Where there are too few, every part has at least one.
    share = min(1.0, len(suite.items) / sum(wanted))
    found, begin = [], 0
    for count in wanted:
        end = begin + (max(1, int(count * share)) if count else 0)
        found.append(replace(suite, items=suite.items[begin:end]))
        begin = end
    return found


def _knows(checkpoint: Checkpoint, text: str) -> bool:
    """Whether the tokenizer has tokens for a text."""
    unknown = checkpoint.tokenizer.unk_token_id
    tokens = checkpoint.encode(text)
    return unknown is None or tokens.count(unknown) <= _UNKNOWN * len(tokens)
