"""Entry of `python -m sgl_lim.evaluate`."""

import sys

from sgl_lim import command

if __name__ == "__main__":
    command.announce("sgl_lim.evaluate")
    from sgl_lim.evaluate.cli import main

    command.run(lambda: main(sys.argv[1:]))
