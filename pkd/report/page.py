"""The page of a report: sections of text, tables and plots, made into one HTML file that needs nothing else."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from pkd import __version__
from pkd.report.style import Picture, Plot

TEMPLATE = Path(__file__).resolve().parent / "page.html"


@dataclass(frozen=True)
class Table:
    """rows: of text; the first column is left-aligned and a row's head. folded: shown on demand. marked: rows in bold."""

    title: str
    head: list[str]
    rows: list[list[str]]
    folded: bool = False
    marked: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset({0})  # columns of words, which are left-aligned


@dataclass(frozen=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    parts: list[Plot | Table] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """cards: (figure, what it is) at the top; notes: what is not there yet; source: shown folded at the end."""

    title: str
    subtitle: str
    cards: list[tuple[str, str]]
    notes: list[str]
    sections: list[Section]
    source: str

    @property
    def plots(self) -> list[Plot]:
        return [part for section in self.sections for part in section.parts if isinstance(part, Plot)]


def html(page: Page, pictures: dict[str, Picture]) -> bytes:
    """The whole file. pictures: by the plots' names. Whatever comes from the data is escaped by the template's engine."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(page=page, pictures=pictures, version=__version__, kind=lambda part: type(part).__name__,
                           written=time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    return text.encode("utf-8", errors="replace")
