"""A folder of small made-up packages, one of them held out from training."""

import random
from pathlib import Path

VERBS = ("read", "write", "merge", "split", "count", "order")
NOUNS = ("node", "edge", "table", "field", "record", "token")


def source_text(seed: int, functions: int = 12) -> str:
    """Python-like text in which a few names come back."""
    rng = random.Random(seed)
    parts = [f'"""Module {seed}."""\n']
    for _ in range(functions):
        verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
        parts.append(
            f"\ndef {verb}_{noun}({noun}s, limit):\n    found = [{noun} for {noun} in {noun}s]\n    return found\n"
        )
    return "\n".join(parts)


def build_packages(folder: Path) -> Path:
    """`alpha` and `beta` to train on, `networkx` held out; traps for a reader that takes everything."""
    files = {f"alpha/part{i}/module{j}.py": source_text(10 * i + j) for i in range(3) for j in range(4)}
    files |= {f"beta/module{j}.py": source_text(100 + j) for j in range(8)}
    files |= {f"networkx/module{j}.py": source_text(200 + j, functions=40) for j in range(6)}
    files["alpha/a_copy.py"] = files["networkx/module0.py"].replace("\n", "\n\n")
    files["beta/twice.py"] = files["beta/module0.py"]
    files["beta/compat/networkx.py"] = source_text(300)
    files["beta/_vendor/gamma/module.py"] = source_text(400)
    files["beta-1.0.dist-info/licences.txt"] = source_text(401)
    files["beta/made.py"] = "# This file is auto-generated. Do not edit.\n" + source_text(402)
    files["beta/short.py"] = "x = 1\n"
    files["beta/minified.py"] = "a=1;" * 600
    files["beta/table.txt"] = "12345 67890 12345 67890\n" * 60
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder
