"""Entry of `python -m sgl_lim.calibrate`."""

import sys

from sgl_lim import command

if __name__ == "__main__":
    command.announce("sgl_lim.calibrate")
    from sgl_lim.calibrate.cli import main

    command.run(lambda: main(sys.argv[1:]))
