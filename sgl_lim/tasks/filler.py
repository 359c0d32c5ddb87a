"""Prose about nothing in particular, made from words: what facts are hidden among. The same seed gives the same."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Words of one subject; every actor can do every deed."""

    actors: tuple[str, ...]
    deeds: tuple[str, ...]
    places: tuple[str, ...]


TOPICS = (
    Topic(
        ("the harbour master", "a fishing crew", "the ferry captain", "an old sailmaker", "the lighthouse keeper"),
        ("mended the nets", "watched the tide turn", "painted the hull", "counted the crates", "waited for the fog"),
        ("along the quay", "behind the boat sheds", "near the breakwater", "below the customs house"),
    ),
    Topic(
        ("the head cook", "two apprentices", "the baker", "a travelling chef", "the woman at the stove"),
        ("kneaded the dough", "tasted the broth", "sharpened the knives", "peeled the onions", "wrote a new menu"),
        ("in the back kitchen", "beside the oven", "at the long table", "under the copper pans"),
    ),
    Topic(
        ("the station clerk", "a tired conductor", "the signal woman", "three passengers", "the night porter"),
        (
            "checked the timetable",
            "missed the last train",
            "swept the platform",
            "read an old paper",
            "sold tickets",
        ),
        ("in the waiting room", "at the northern junction", "beyond the level crossing", "under the clock"),
    ),
    Topic(
        ("the gardener", "a neighbour's child", "the beekeeper", "some visitors", "the owner of the orchard"),
        ("pruned the pear trees", "carried water", "looked for ripe plums", "turned the compost", "repaired the fence"),
        ("beyond the greenhouse", "between the hedges", "at the foot of the hill", "by the stone well"),
    ),
    Topic(
        ("the librarian", "a patient student", "the bookbinder", "an absent-minded professor", "the archivist"),
        (
            "sorted the letters",
            "copied a map",
            "dusted the shelves",
            "looked for a missing volume",
            "took short notes",
        ),
        ("in the reading room", "on the upper gallery", "near the catalogue", "in the cold cellar"),
    ),
    Topic(
        ("the weather observer", "a mountain guide", "the ski patrol", "a party of hikers", "the hut warden"),
        ("measured the snow", "melted ice for tea", "mapped the ridge", "listened to the wind", "dried wet boots"),
        ("above the tree line", "on the western slope", "inside the shelter", "close to the pass"),
    ),
    Topic(
        ("the theatre director", "the second violinist", "a young dancer", "the stage crew", "the costume maker"),
        (
            "rehearsed the last scene",
            "moved the scenery",
            "tuned the piano",
            "sewed silver buttons",
            "argued politely",
        ),
        ("behind the curtain", "in the empty hall", "on the narrow stairs", "beside the orchestra pit"),
    ),
    Topic(
        ("the glassblower", "a careful carpenter", "the clockmaker", "her oldest customer", "the potter"),
        ("finished a small vase", "planed a plank", "oiled the gears", "mixed a blue glaze", "drew a simple plan"),
        ("in the workshop", "near the kiln", "at the crowded bench", "in front of the window"),
    ),
)
_TIMES = (
    "Early in the morning",
    "After lunch",
    "On most days",
    "That winter",
    "Before the rain",
    "Later",
    "Once again",
)
_JOINS = ("while", "and then", "because nobody else had", "although it was late when", "as soon as", "just before")
_ENDS = ("without any hurry", "for the third time that week", "as usual", "with great care", "and nobody minded")
_SENTENCES_A_TOPIC = (3, 8)
TOKENS_A_SENTENCE = 8
"""At least, by any tokenizer."""
COLOURS = ("copper", "silver", "green", "violet", "amber", "scarlet", "ivory", "turquoise", "golden", "crimson")
THINGS = (
    "lantern",
    "suitcase",
    "violin",
    "teapot",
    "compass",
    "umbrella",
    "telescope",
    "wardrobe",
    "bicycle",
    "mirror",
)


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences without end, some of one topic and then some of another."""
    while True:
        topic = rng.choice(TOPICS)
        for _ in range(rng.randint(*_SENTENCES_A_TOPIC)):
            yield _sentence(rng, topic)


def _sentence(rng: random.Random, topic: Topic) -> str:
    (actor, other), (deed, second) = rng.sample(topic.actors, 2), rng.sample(topic.deeds, 2)
    place, time, join, end = rng.choice(topic.places), rng.choice(_TIMES), rng.choice(_JOINS), rng.choice(_ENDS)
    forms = (
        f"{time}, {actor} {deed} {place}.",
        f"{actor} {deed} {place}, {join} {other} {second}.",
        f"{place.capitalize()}, {actor} {deed} {end}.",
        f"{time}, {actor} {deed}, {join} {other} {second} {place}.",
    )
    text = rng.choice(forms)
    return text[0].upper() + text[1:]


def hide(facts: Sequence[tuple[int, str]], prose: Sequence[str]) -> str:
    """Sentences of prose with facts between them.

    Args:
        facts: percent of the prose before each, and its sentence; the deepest first.
    """
    lines = list(prose)
    for place, fact in facts:
        lines.insert(len(prose) * place // 100, fact)
    return " ".join(lines)


def names(rng: random.Random, count: int) -> list[str]:
    """So many different things, such as `copper lantern`."""
    return rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], count)
