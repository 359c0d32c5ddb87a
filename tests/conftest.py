"""A terminated test session ends like an interrupted one, so that fixtures stop the servers they started."""

import signal


def pytest_configure() -> None:
    """Let SIGTERM do what Ctrl-C does. (pytest takes `SystemExit` for the failure of one test, and goes on.)"""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
