"""`pkd report RUN|STUDY`: one page about a run or a study, and its plots as PNGs beside it."""

import re
from pathlib import Path

from pkd.console import Console
from pkd.errors import UserError
from pkd.files import write_bytes

PICTURE = "pkd report"  # the software that a plot's PNG says it is of
MARK = b'<meta name="generator" content="pkd report'  # by which an earlier report is known
PLOTS = re.compile(rb'<meta name="plots" content="([\w -]*)">')


def report(path: Path, target: Path | None, console: Console) -> Path:
    """Write the page to `target` (<path>/report.html by default), its plots into a folder of the same name without .html.

    A report that is there is replaced. Raises UserError where there is nothing to report on, or something else in the way.
    """
    target = target or path / "report.html"
    study, run = (path / "study.json").exists(), (path / "run.json").exists()
    if not study and not run:
        raise UserError(f"{path} holds neither a run (run.json) nor a study (study.json): give a folder that pkd distill or "
                        "pkd study writes")
    _check_target(target)
    try:
        from pkd.report.page import html
        from pkd.report.style import picture
    except ModuleNotFoundError as error:
        raise UserError(f'pkd report needs {error.name}, which is not installed: run pip install matplotlib '
                        "jinja2") from None
    if study:
        from pkd.report.study import page_of
    else:
        from pkd.report.run import page_of
    page = page_of(path)
    pictures = {plot.name: picture(plot) for plot in page.plots}
    folder, stale = target.with_suffix(""), _plots_of(target) - set(pictures)
    for name in (*stale, *pictures):
        _check_plot(folder / f"{name}.png")
    write_bytes(target, html(page, pictures))
    for name in stale:  # of students that are gone, perhaps
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, own in pictures.items():
        write_bytes(folder / f"{name}.png", own.png)
    for note in page.notes:
        console.say(note)
    console.say(f"report: {target}, {len(pictures)} plots as PNG in {folder}")
    return target


def _plots_of(target: Path) -> set[str]:
    """Names of the plots of an earlier report, if there is one; as a page says them, they are letters, digits and dashes."""
    found = PLOTS.search(target.read_bytes()[:4000]) if target.exists() else None
    return set(found[1].decode().split()) if found else set()


def _check_plot(path: Path) -> None:
    """Raises UserError where a file of a plot's name is none of a report, as beside a report that was copied."""
    if path.is_dir() or (path.exists() and PICTURE.encode() not in path.read_bytes()[:1000]):
        raise UserError(f"{path}, where a plot would go, is there already and not of a report: move it, or give another "
                        "name with --to")


def _check_target(target: Path) -> None:
    """Raises UserError where something is that is not an earlier report."""
    if target.suffix != ".html":
        raise UserError(f"--to is {target}, but a report is an HTML file: give a name that ends in .html")
    if target.is_dir():
        raise UserError(f"--to is {target}, which is a folder: give the name of a file in it")
    folder = target.with_suffix("")
    if target.exists() and MARK not in target.read_bytes()[:2000]:
        raise UserError(f"{target} is there and no report of pkd: give another name with --to")
    if not target.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}, where the plots would go, is there already and not of a report: give another name with "
                        "--to")
