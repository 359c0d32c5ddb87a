"""A terminated test session ends like an interrupted one, so that fixtures stop the servers they started."""

import signal
import sys


def pytest_configure() -> None:
    """Turn SIGTERM into an exit that runs clean-up."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
