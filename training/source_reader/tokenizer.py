"""The model's byte-level BPE: trained on a sample of the training packages and of chains, committed beside this file.

    PYTHONPATH=.:training python -m source_reader.tokenizer training/source_reader/tokenizer.json

A word and the blank before it are one piece, digits are apart from letters, in groups of at most three: so a number of
a chain is one token, wherever it stands.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sgl_lim.tasks.chains import MODULUS, NUM_NODES, make_chain

from .corpus import find_sources, fingerprint, package_folders, read_text, titled

FILE = Path(__file__).with_name("tokenizer.json")
VOCABULARY = 8192
SPECIAL = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(len(SPECIAL))
# A sign or a blank before letters; digits by three; signs and their line ends; line ends; indentation but its end.
PIECE = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def load_tokenizer(file: Path = FILE) -> Tokenizer:
    """The committed tokenizer; `<bos>` comes in front by default."""
    return Tokenizer.from_file(str(file))


def train_tokenizer(texts: Iterator[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE whose first ids are `SPECIAL`. Equal texts give an equal tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def sample_texts(size: int, seed: int = 0) -> Iterator[str]:
    """About `size` bytes of the installed training packages, no package more than a tenth, and a little of chains."""
    rng = random.Random(seed)
    sources = [s for s in find_sources(package_folders()) if not s.held_out]
    rng.shuffle(sources)
    seen: set[bytes] = set()
    taken: dict[str, int] = {}
    for source in sources:
        package = source.name.split("/")[0]
        if sum(taken.values()) >= size or taken.get(package, 0) >= size // 10:
            continue
        text = read_text(source.file)
        if text is None or (mark := fingerprint(text)) in seen:
            continue
        seen.add(mark)
        taken[package] = taken.get(package, 0) + len(text)
        yield titled(source, text)
    # Every number of a chain has to become one token, with and without a blank before it.
    numbers = " ".join(f"v{n} {n} " for n in range(max(MODULUS, NUM_NODES)))
    yield from [numbers] * max(1, size // 40_000)
    for _ in range(max(1, size // 200_000)):
        problem = make_chain(rng, num_facts=rng.randint(2, NUM_NODES), num_steps=2)
        yield f"{problem.prompt} {problem.solution}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bytes", type=int, default=60_000_000, help="of sample")
    args = parser.parse_args()
    tokenizer = train_tokenizer(sample_texts(args.bytes))
    tokenizer.save(str(args.out), pretty=False)


if __name__ == "__main__":
    main()
