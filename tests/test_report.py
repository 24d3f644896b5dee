"""The page about a run or a study: what it says, what it escapes, and what a real browser makes of it."""

import base64
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from made_up import figures_of, made_up
from PIL import Image
from ranks import refused, run

from pkd.console import Console
from pkd.errors import UserError
from pkd.files import append_line, read_json, read_lines, write_json
from pkd.report.command import report
from pkd.report.facts import gather
from pkd.report.run import page_of
from pkd.report.style import Plot

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = ["<script>document.title='broken'</script>", '"><img src=http://example.invalid/x onerror=alert(1)>', "</style>",
           "$\\frac{$", "_under & over", "{{ 7 * 7 }}", "\x00\x1b[31mred", "a" * 300, "猫", "nine"]
quiet = Console(quiet=True)


class Tags(HTMLParser):
    """Every element of a page with its attributes, and all of its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(path: Path) -> Tags:
    """A report, whose every element must be harmless and whose every picture must be whole."""
    page = Tags(path.read_text())
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed"})
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        for key in ("src", "srcset", "href"):
            value = attributes.get(key, "data:,")
            assert value.startswith(("data:", "#")), value[:80]
            if value.startswith("data:image/svg+xml;base64,"):
                xml.fromstring(base64.b64decode(value.partition(",")[2]))
        assert tag != "img" or len(attributes["alt"]) > 20
    return page


@pytest.fixture(scope="module")
def copied(finished, tmp_path_factory) -> Path:
    """A finished run that nobody has evaluated."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("summary.json", "predictions.*", "checkpoints"))
    return folder


@pytest.fixture(scope="module")
def evaluated(copied) -> Path:
    folder = copied.with_name("evaluated")
    shutil.copytree(copied, folder)
    run(1, "evaluate", folder)
    return folder


@pytest.fixture(scope="module")
def hostile(evaluated, taught) -> Path:
    """The evaluated run with classes whose names are meant to break a page, and its report."""
    folder = evaluated.with_name("hostile")
    shutil.copytree(evaluated, folder)
    shutil.copytree(taught / "teachers", folder / "teachers", dirs_exist_ok=True)
    write_json(folder / "pyramid.json", {**read_json(taught / "pyramid.json"), "classes": HOSTILE})
    record = read_json(folder / "run.json")
    write_json(folder / "run.json", {**record, "free": {**record["free"], "teachers_from": None}})
    return report(folder, None, quiet)


def test_the_command_writes_one_page_and_its_plots(evaluated):
    said = run(1, "report", evaluated)[0].out
    assert str(evaluated / "report.html") in said.replace("\n", "")
    page, summary = read(evaluated / "report.html"), read_json(evaluated / "summary.json")
    names = {"curves", "speed", "pyramid", "placement", "confusion", "reliability", "agreement"}
    assert {path.stem for path in (evaluated / "report").iterdir()} == names
    for path in (evaluated / "report").glob("*.png"):
        assert Image.open(path).width > 500
    for name in ("mobile", "shuffle", "ensemble", "level1-0", "level2-2", "rank 1"):
        assert name in page.text
    assert f"{100 * summary['ensemble']['accuracy']:.2f} %" in page.text
    assert 'class="notes"' not in (evaluated / "report.html").read_text(), "nothing is missing"


def test_class_names_are_text_and_nothing_else(hostile):
    page = read(hostile)
    assert HOSTILE[0] in page.text and HOSTILE[2] in page.text and HOSTILE[5] in page.text
    assert "\x00" not in page.text and "\x1b" not in page.text
    assert [attributes for tag, attributes in page.tags if "example" in str(attributes.get("src"))] == []


def test_a_run_that_goes_on_says_what_is_not_there_yet(copied, tmp_path):
    assert any("run pkd evaluate" in note for note in page_of(copied).notes)
    assert "Confusion" not in titles(copied) and {"Training", "Pyramid", "Placement"} <= titles(copied)
    folder = tmp_path / "going"
    shutil.copytree(copied, folder, ignore=shutil.ignore_patterns("students"))
    write_json(folder / "state" / "distill.json", {"state": "stopped", "time": 0.0})
    lines = (folder / "metrics.jsonl").read_text().splitlines(True)
    (folder / "metrics.jsonl").write_text(lines[0] + lines[1][:40])  # the second is being written
    page = read(report(folder, None, quiet))
    assert "Distillation is not finished (stopped): epoch 1 of 2" in page.text and "1 of 2 epochs" in page.text
    (folder / "metrics.jsonl").unlink()
    (folder / "placement.json").unlink()
    assert page_of(folder).notes == ["No epoch of distillation has ended yet, so there are no curves."]
    assert titles(folder) == {"Pyramid"}


def test_a_file_of_a_run_that_is_not_as_pkd_wrote_it_is_one_sentence(copied, evaluated, tmp_path):
    folder = tmp_path / "strange"
    shutil.copytree(evaluated, folder)
    summary = read_json(folder / "summary.json")
    for content in ({}, {key: summary[key] for key in summary if key != "students"}, []):
        write_json(folder / "summary.json", content)
        with pytest.raises(UserError, match=r"summary\.json is not what|is not as pkd wrote it|is damaged"):
            report(folder, None, quiet)
    write_json(folder / "summary.json", {})
    assert "is not what pkd evaluate writes" in refused(1, "status", folder)


def test_how_busy_ranks_were_is_of_the_placement_that_is_shown(copied, tmp_path):
    """A run that goes on in another placement has epochs of both."""
    folder = tmp_path / "moved"
    shutil.copytree(copied, folder)
    lines = read_lines(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").unlink()
    for line, share in zip(lines, (0.9, 0.25), strict=True):
        append_line(folder / "metrics.jsonl", {**line, "busy": [share] * len(line["busy"])})

    def said() -> str:
        section = next(one for one in page_of(folder).sections if one.title == "Placement")
        return " ".join([*section.text, next(part.alt for part in section.parts if isinstance(part, Plot))])
    assert " 25 %" not in said() and "other placement" not in said()
    write_json(folder / "placement.json", {**read_json(folder / "placement.json"), "since_epoch": 1})
    assert " 25 %" in said() and "since epoch 2; the epochs before were of another placement" in said()


def test_teachers_alone_and_teachers_that_are_gone(taught, evaluated, tmp_path):
    assert titles(taught) == {"Pyramid"} and "validation split" in page_of(taught).sections[0].text[0]
    folder = tmp_path / "alone"
    shutil.copytree(evaluated, folder)
    record = read_json(folder / "run.json")
    write_json(folder / "run.json", {**record, "free": {**record["free"], "teachers_from": str(tmp_path / "gone")}})
    facts = gather(folder)
    assert [teacher.classes for teacher in facts.teachers[3:]] == [(0, 1, 2), (3, 4), (5, 6, 7, 8, 9)]
    assert len(facts.classes) == 10 and all(teacher.split == "test" for teacher in facts.teachers)
    assert titles(folder) == titles(evaluated)


def titles(folder: Path) -> set[str]:
    return {section.title for section in page_of(folder).sections}


def a_study() -> dict:
    """Two controls and three other arms, one of them with one seed only and one that costs too much."""
    arms = {"alone": (0.66, True, 0.0), "top": (0.80, True, 2.0), "composed": (0.90, False, 2.0), "dear": (0.99, False, 2.2)}
    results = [made_up(arm, seed, accuracy, accuracy, control, cost)
               for arm, (accuracy, control, cost) in arms.items() for seed in range(3)]
    results[0]["title"] = "labels <only> & nothing else"
    return figures_of([*results, made_up("paper", 0, 0.7, 0.7, False, 2.0)], [*arms, "paper"], (0, 1, 2))


def test_a_study_says_who_wins_and_by_how_much(tmp_path):
    study = a_study()
    write_json(tmp_path / "study.json", study)
    page = read(report(tmp_path, None, quiet))
    assert {path.stem for path in (tmp_path / "report").iterdir()} == {"differences", "compute"}
    assert 'is "top"' in page.text and "labels <only> & nothing else" in page.text
    whole = {one["arm"]: one for one in study["differences"] if one["network"] == "ensemble" and one["against"] == "top"}
    gap, (low, high) = whole["composed"]["difference"], whole["composed"]["interval"]
    assert low > 0 and (f'"composed" beats it: +{100 * gap:.2f} points, 95 % interval [+{100 * low:.2f}, '
                        f'+{100 * high:.2f}], 3 seeds') in page.text
    assert '"paper" is below it' in page.text and '"paper" loses' not in page.text, "one comparison decides"
    assert '"dear" is above it, which decides nothing' in page.text and "Teachers of dear cost more" in page.text
    mean, sd = study["arms"]["composed"]["networks"]["ensemble"]["accuracy"]
    assert f"{100 * mean:.2f} ± {100 * sd:.2f}" in page.text and "read 13 times" in page.text
    assert "13 runs done" in page.text and "not finished: paper-seed-1, paper-seed-2" in page.text
    write_json(tmp_path / "study.json", figures_of([], ["top"]))
    begun = read(report(tmp_path, None, quiet)).text
    assert "no best control yet" in begun and "0 runs done" in begun and "None" not in begun
    write_json(tmp_path / "study.json", {"recipe": "tiny"})
    with pytest.raises(UserError, match="does not describe a study"):
        report(tmp_path, None, quiet)


def test_what_no_interval_tells_apart_is_named_together_and_what_decides_by_itself(tmp_path):
    arms = {"top": (0.80, True), "peers": (0.795, True), "composed": (0.805, False), "paper": (0.8, False)}
    results = [made_up(arm, seed, accuracy, accuracy, control, 2.0)
               for arm, (accuracy, control) in arms.items() for seed in range(3)]
    study = figures_of(results, [*arms], (0, 1, 2))
    write_json(tmp_path / "study.json", study)
    text = read(report(tmp_path, None, quiet)).text
    deciding = next(one for one in study["differences"] if one["decides"])
    assert f'"{deciding["arm"]}" cannot be told apart from it: ' in text and text.count("told apart from it") == 2
    named = text.partition("their intervals include 0: ")[2].partition(".")[0]
    assert sorted(named.split(", ")) == sorted(f'"{arm}"' for arm in arms if arm not in (deciding["arm"], "top"))


def test_plots_that_the_new_report_has_not_go_with_the_old_one(tmp_path):
    """They may be of other students."""
    write_json(tmp_path / "study.json", a_study())
    page = report(tmp_path, None, quiet)
    plots = {path.name for path in (tmp_path / "report").iterdir()}
    page.write_bytes(page.read_bytes().replace(b'name="plots" content="', b'name="plots" content="confusion '))
    shutil.copy(tmp_path / "report" / min(plots), tmp_path / "report" / "confusion.png")
    (tmp_path / "report" / "mine.png").write_bytes(b"")
    report(tmp_path, None, quiet)
    assert {path.name for path in (tmp_path / "report").iterdir()} == plots | {"mine.png"}


def test_nothing_but_an_earlier_report_is_replaced(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="neither a run"):
        report(tmp_path, None, quiet)
    write_json(tmp_path / "study.json", a_study())
    report(tmp_path, tmp_path / "copied.html", quiet)
    plot = min((tmp_path / "copied").iterdir())
    plot.write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{plot.name}, where a plot would go, is there already"):
        report(tmp_path, tmp_path / "copied.html", quiet)
    with pytest.raises(UserError, match=r"ends in \.html"):
        report(tmp_path, tmp_path / "page", quiet)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match="no report of pkd"):
        report(tmp_path, tmp_path / "mine.html", quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "compute.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="not of a report"):
        report(tmp_path, tmp_path / "other.html", quiet)
    for name in [name for name in sys.modules if name.startswith("pkd.report.") and name != "pkd.report.command"]:
        monkeypatch.delitem(sys.modules, name)
    assert [plot.read_bytes(), (tmp_path / "other" / "compute.png").read_bytes()] == [b"mine"] * 2
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>" and not (tmp_path / "other.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs matplotlib.*pip install matplotlib jinja2"):
        report(tmp_path, None, quiet)
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def served(hostile):
    """The report's address on a server of this process, which keeps what it is asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=hostile.parent)

        def log_message(self, *arguments):
            asked.append(self.path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def pages(hostile) -> dict[str, tuple[str, int]]:
    """What is reported -> its page on that server, and how many pixels high it is about."""
    write_json(hostile.parent / "study" / "study.json", a_study())
    report(hostile.parent / "study", None, quiet)
    return {"run": ("report.html", 4200), "study": ("study/report.html", 2800)}


def browse(address: str, folder: Path, *options: str) -> tuple[str, list[str]]:
    """What a browser says of a page, and the addresses from which the page loads something else."""
    log, origin = folder / "net.json", address.rpartition("/")[0].replace("/study", "")
    ended = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", f"--log-net-log={log}", *options, address],
        capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    own = [line for line in log.read_text().splitlines() if f'"initiator":"{origin}"' in line]  # else the browser's own
    return ended.stderr, re.findall(r'"url":"(?!data:)([^"]*)"', "".join(own))


in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium to see the page in a real "
                                  "browser")


@in_a_browser
def test_the_browser_would_tell_what_a_page_loads(served, hostile, tmp_path):
    origin, asked = served
    elsewhere = origin.replace("127.0.0.1", "localhost") + "/elsewhere.png"
    (hostile.parent / "loads.html").write_text(f'<img src="{elsewhere}"><script>console.error("said")</script>')
    said, loaded = browse(f"{origin}/loads.html", tmp_path, "--dump-dom")
    assert elsewhere in loaded and "/elsewhere.png" in asked and "CONSOLE" in said


@in_a_browser
@pytest.mark.parametrize("what", ["run", "study"])
def test_a_real_browser_shows_the_page_and_asks_for_nothing_else(what, served, pages, tmp_path):
    (origin, asked), shot = served, tmp_path / "page.png"
    page, height = pages[what]
    said, loaded = browse(f"{origin}/{page}", tmp_path, f"--window-size=1200,{height}", f"--screenshot={shot}")
    assert shot.exists() and "CONSOLE" not in said, said[-2000:]
    assert asked == [f"/{page}"] and not loaded
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (height, 1200)
    orange = (np.abs(pixels - [0xbc, 0x4c, 0x00]).sum(2) < 12).any(1)  # a colour of the plots that the page has not
    ink = (pixels.sum(2) < 300).any(1)
    assert ink.sum() > height / 7 and orange.sum() > 5
    assert what == "study" or (orange[:2200].sum() > 50 and orange[2200:].sum() > 50)
