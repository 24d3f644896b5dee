"""Signals that ask for a stop; kept apart so that they can be caught before the slow imports."""

import signal
import time

ONE = 2.0  # seconds within which signals are one: a launcher hands on what the terminal sent to everybody


class Signalled:
    """Whether a signal came. A plain attribute: a lock in a signal's handler could wait for itself."""

    yes = False


signalled = Signalled()


def catch_signals() -> None:
    """From now on SIGTERM, SIGUSR1, Ctrl-C and the terminal's end only ask: the ranks stop together at the next ballot, and
    save. A second Ctrl-C, some seconds later, is a KeyboardInterrupt as usual.
    """
    asked = float("inf")  # when the first Ctrl-C came

    def note(number, _) -> None:
        nonlocal asked
        signalled.yes = True
        if number == signal.SIGINT:
            asked = min(asked, time.monotonic())
            if time.monotonic() - asked > ONE:
                raise KeyboardInterrupt
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's & ask for
            signal.signal(number, note)
