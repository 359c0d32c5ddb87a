"""Entry of `python -m sgl_lim.evaluate`."""

import sys

if __name__ == "__main__":
    from sgl_lim.evaluate.cli import main

    sys.exit(main(sys.argv[1:]))
