"""The set of glyphs that a user renders: designs apart, the same every time, refused where there are too few fonts."""

import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ranks import REPOSITORY

from pkd.source_files import read_npz

sys.path.insert(0, str(REPOSITORY / "launch"))
import render_glyphs
from render_glyphs import CHARACTERS, Font, designs, divide, find_fonts, main

FONTS = Path("/usr/share/fonts")
SMALL = ["--characters", "10", "--train", "6", "--validation", "2", "--test", "2", "--least", "2"]


@pytest.fixture(scope="module")
def fonts() -> list[Font]:
    found = find_fonts([FONTS], CHARACTERS) if shutil.which("fc-scan") else []
    if len(designs(found, CHARACTERS) if found else []) < 2:
        pytest.skip("fewer than two Japanese designs are installed: apt-get install fontconfig fonts-motoya-l-cedar "
                    "fonts-sawarabi-mincho")
    return found


def test_there_are_100_characters():
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 100


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_every_design_is_for_one_thing_a_quarter_for_testing_and_an_eighth_for_validation(count, seed):
    every = [[Font(f"{k}.ttf", 0, frozenset({str(k)}))] for k in range(count)]
    parts = divide(every, seed)
    assert list(parts) == ["train", "validation", "test"] and parts["train"]
    assert sorted(map(str, itertools.chain(*parts.values()))) == sorted(map(str, every))
    assert len(parts["test"]) == max(1, round(count / 4)) and len(parts["validation"]) == round(count / 8)
    assert divide(every, seed) == parts


def test_weights_of_a_family_and_fonts_with_the_same_drawings_are_one_design(fonts):
    renamed = Font(fonts[0].file, fonts[0].index, frozenset({"Another Name"}))
    named = Font(fonts[-1].file, fonts[-1].index, frozenset({f"{min(fonts[0].families)} - Bold"}))
    found = designs([*fonts, renamed, named], CHARACTERS)
    own, = [design for design in found if fonts[0] in design]
    assert renamed in own and named in own
    assert sum(map(len, found)) == len(fonts) + 2


def test_the_same_seed_renders_the_same_file_and_another_seed_another(fonts, tmp_path, capsys):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        words = ["--to", str(tmp_path / f"{name}.npz"), "--sheet", str(tmp_path / f"{name}.png"), "--seed", seed]
        assert main([*SMALL, "--fonts", str(FONTS), *words]) == 0
    for words in (["--to", str(tmp_path / "a.npz")],
                  ["--to", str(tmp_path / "new.npz"), "--sheet", str(tmp_path / "a.npz")]):
        assert main([*SMALL, "--fonts", str(FONTS), *words]) == 2, "what is there stays"
    assert not (tmp_path / "new.npz").exists()
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c
    images, labels, classes, test, validation, _ = read_npz(tmp_path / "a.npz")
    said = capsys.readouterr().out
    assert "train: " in said and "test: " in said and validation == (20 if "validation: " in said else 0)
    assert images.shape == (80 + validation, 1, 28, 28) and test == 20
    assert len(set(classes)) == 10 and set(classes) < set(CHARACTERS)
    assert np.bincount(labels[:60]).tolist() == [6] * 10 and np.bincount(labels[-20:]).tolist() == [2] * 10
    assert len({image.tobytes() for image in images}) == len(images) and images.std((1, 2, 3)).min() > 5
    assert Image.open(tmp_path / "a.png").width == 8 * 28


def test_too_few_designs_are_refused_and_what_was_there_stays(tmp_path, capsys):
    if not shutil.which("fc-scan"):
        pytest.skip("fc-scan is not here: apt-get install fontconfig")
    (tmp_path / "glyphs.npz").write_text("precious")
    (tmp_path / "fonts").mkdir()
    assert main([*SMALL, "--fonts", str(tmp_path / "fonts"), "--to", str(tmp_path / "glyphs.npz")]) == 2
    said = capsys.readouterr().err
    assert "at least 2 designs" in said and "0 fonts" in said and said.count("\n") == 1
    assert (tmp_path / "glyphs.npz").read_text() == "precious"


def test_without_fontconfig_the_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert render_glyphs.main(["--to", str(tmp_path / "x.npz")]) == 2 and "fontconfig" in capsys.readouterr().err
