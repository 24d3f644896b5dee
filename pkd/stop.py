"""Signals that ask for a stop; kept apart so that they can be caught before the slow imports."""

import signal


class Signalled:
    """Whether a signal came. A plain attribute: a lock in a signal's handler could wait for itself."""

    yes = False


signalled = Signalled()


def catch_signals() -> None:
    """From now on SIGTERM and SIGUSR1 only ask: the ranks stop together at the next ballot, and save."""
    def note(*_) -> None:
        signalled.yes = True
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
