"""Entry of `python -m sgl_lim.programs`."""

import os
import sys
import threading

from sgl_lim import command
from sgl_lim.programs.cli import main


def _main() -> int:
    code = main(sys.argv[1:])
    waiting = [
        thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()
    ]
    if waiting:
        # A stopped run's threads wait for generations that nobody wants any more, and Python would wait for them;
        # the server aborts those requests once their connections close.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    command.run(_main)
