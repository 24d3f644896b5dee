"""The errors that a user can mend: one sentence each, exit code 2, no traceback (pkd/cli.py prints them)."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was asked, what was found (with the numbers), what to change; one sentence, on one line whatever is in it."""

    def __init__(self, sentence: str):
        super().__init__(" ".join(sentence.split()))


class LocalError(UserError):
    """A UserError that only this rank can know of, so that it has to say it itself."""


class PassingError(Exception):
    """What the next start may well be spared, such as a file server that does not answer; one sentence, exit code 1, after
    which Slurm queues the job again.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known word closest to `word`, or '' if none is close."""
    if len(word) > 100:  # no typing mistake
        return ""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
