"""Signals that ask for a stop; kept apart so that they can be caught before the slow imports."""

import signal
import threading

signalled = threading.Event()


def catch_signals() -> None:
    """From now on SIGTERM and SIGUSR1 only ask: the ranks stop together at the next ballot, and save."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: signalled.set())
