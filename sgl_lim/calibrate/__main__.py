"""Entry of `python -m sgl_lim.calibrate`."""

import sys

if __name__ == "__main__":
    # SGLang's spawned processes import this file too, and need none of it.
    from sgl_lim.calibrate.cli import main

    sys.exit(main(sys.argv[1:]))
