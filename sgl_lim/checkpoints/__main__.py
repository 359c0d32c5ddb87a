"""Entry of `python -m sgl_lim.checkpoints`."""

import sys

from sgl_lim import command

if __name__ == "__main__":
    from sgl_lim.checkpoints.cli import main

    command.run(lambda: main(sys.argv[1:]))
