"""How the plots of a report look: two sets of colours, for light and for dark pages; words that fit; figures as files."""

import base64
import io
import logging
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pkd.report.command import PICTURE

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # that a font has no bold letters is nobody's concern
# matplotlib's own, then what may be there for letters that it lacks; a page's texts are the browser's.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Droid Sans Fallback", "IPAGothic", "WenQuanYi Zen Hei")
NOTHING = "-"  # in place of a figure that is not there
PIXELS_PER_INCH = 96  # as a browser shows them; texts of 9 points are then 12 pixels high


@dataclass(frozen=True)
class Theme:
    ink: str
    muted: str
    line: str
    surface: str
    box: str
    colours: tuple[str, ...]

    def all(self) -> tuple[str, ...]:
        return (self.ink, self.muted, self.line, self.surface, self.box, *self.colours)

    def colour(self, index: int) -> str:
        return self.colours[index % len(self.colours)]

    @property
    def shades(self) -> LinearSegmentedColormap:
        """From the page's own colour to a strong one."""
        return LinearSegmentedColormap.from_list("pkd", [self.surface, self.colours[0], self.ink])

    def on(self, value: float) -> str:
        """The colour of text on shades(value)."""
        return self.ink if value < 0.35 else self.surface

    def settings(self) -> dict:
        """matplotlib's; class names with $ in them are no mathematics."""
        return {
            "font.family": [name for name in FONTS if name in font_manager.get_font_names()],
            "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "pkd", "font.size": 9, "axes.titlesize": 10,
            "axes.titlelocation": "left", "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6, "grid.color": self.line,
            "figure.facecolor": self.surface, "axes.facecolor": self.surface, "axes.edgecolor": self.muted,
            "text.color": self.ink, "axes.labelcolor": self.ink, "axes.titlecolor": self.ink,
            "xtick.color": self.muted, "ytick.color": self.muted, "xtick.labelcolor": self.ink, "ytick.labelcolor": self.ink,
            "hatch.color": self.muted, "hatch.linewidth": 0.5}


LIGHT = Theme("#1b1f24", "#57606a", "#d8dee4", "#ffffff", "#f1f4f8",
              ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#0e7490", "#6e7781"))
DARK = Theme("#e6edf3", "#9da7b3", "#343b44", "#14181e", "#1f252d",
             ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#f778ba", "#d29922", "#39c5cf", "#8b949e"))
IN_THE_DARK = {light.encode(): dark.encode() for light, dark in zip(LIGHT.all(), DARK.all())}


@dataclass(frozen=True)
class Plot:
    """name: of its PNG; alt: what it shows, in words, for who does not see it; draw: the figure in a theme."""

    name: str
    title: str
    alt: str
    draw: Callable[[Theme], Figure]


@dataclass(frozen=True)
class Picture:
    """A drawn plot: data URIs for the page, width in pixels, and the PNG's bytes."""

    plot: Plot
    light: str
    dark: str
    width: int
    png: bytes


def picture(plot: Plot) -> Picture:
    """Draw a plot in both themes; in the second by other colours in the same drawing, where it has no shades."""
    with _settings(LIGHT):
        drawn = plot.draw(LIGHT)
        light = _saved(drawn, "svg")
        drawn.set_layout_engine("none")  # everything has its place by now
        png = _saved(drawn, "png")
    if any(axes.images for axes in drawn.axes):
        with _settings(DARK):
            dark = _saved(plot.draw(DARK), "svg")
    else:
        dark = re.sub(rb"#[0-9a-f]{6}", lambda found: IN_THE_DARK.get(found[0], found[0]), light)
    uris = [f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (light, dark)]
    return Picture(plot, *uris, round(drawn.get_figwidth() * PIXELS_PER_INCH), png)


@contextmanager
def _settings(theme: Theme):
    with matplotlib.rc_context(theme.settings()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has more letters than our font
        yield


def _saved(drawn: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    drawn.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": PICTURE})
    return file.getvalue()


def figure(width: float, height: float) -> Figure:
    """In inches; everything in it is kept apart."""
    return Figure(figsize=(width, height), layout="constrained")


def short(text: str, most: int) -> str:
    """A word of the data's on one line of at most `most` characters, without any that cannot be shown."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return text if len(text) <= most else f"{text[:most - 1]}…"


def listed(names: list[str], most: int) -> str:
    """As many of the names as fit into `most` characters, and how many more there are."""
    out = ""
    for index, name in enumerate(names):
        more = f" +{len(names) - index - 1}" if index + 1 < len(names) else ""
        wider = f"{out}{', ' if out else ''}{short(name, max(8, most // 2))}"
        if out and len(wider) + len(more) > most:
            return f"{out} +{len(names) - index}"
        out = wider
    return out


def counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def percent(fraction: float | None, digits: int = 1) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.{digits}f} %"
