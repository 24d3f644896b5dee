"""Which commit a page of results is of."""

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True).stdout


def changed() -> bytes:
    """What the working tree has that its commit has not; pages of results, which benchmarks write, do not count."""
    return git("diff", "HEAD", "--", ".", ":(exclude)tests/bench/RESULTS*.md")


def commit() -> str:
    return git("describe", "--always").decode().strip() + "-dirty" * bool(changed())
