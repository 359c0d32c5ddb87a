"""Entry of `python -m sgl_lim.checkpoints`."""

import sys

if __name__ == "__main__":
    from sgl_lim.checkpoints.cli import main

    sys.exit(main(sys.argv[1:]))
