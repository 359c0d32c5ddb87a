"""Entry of `python -m sgl_lim.calibrate`."""

import sys

from sgl_lim.calibrate.cli import main

sys.exit(main(sys.argv[1:]))
