"""What leaves a run: the same predictions in every format, for programs that know nothing of pkd."""

import ast
import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import torch
from made_up import figures_of, in_several_files, made_up
from PIL import Image
from ranks import REPOSITORY, refused, run
from torch import nn

from pkd.classifier import open_classifier
from pkd.console import Console
from pkd.errors import UserError
from pkd.export import export
from pkd.export_hub import _effect, _preprocessing
from pkd.export_onnx import export_onnx, need
from pkd.files import new_folder, write_json
from pkd.model_card import IMAGE, SNIPPET, _data, _source
from pkd.models import build, description
from pkd.recipe import Model
from pkd.recipe_file import identity, load_recipe
from pkd.run_folder import RunFolder
from pkd.study.arms import built_in

WITHOUT_PKD = """\
import sys, torch
sys.modules["pkd"] = None
try:
    import torchvision
except RuntimeError:  # a CPU torch beside a CUDA torchvision, see pkd/vision.py
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
pytestmark = pytest.mark.timeout(900)  # the first test waits for all exports


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(finished, folder)
    run(1, "evaluate", folder)
    return folder


@pytest.fixture(scope="module")
def exports(evaluated) -> dict[str, Path]:
    """The ensemble by format, and student shuffle as "<format>-shuffle"."""
    paths = {"run": evaluated}
    for form in ("safetensors", "onnx", "hub"):
        paths[form], paths[f"{form}-shuffle"] = (evaluated.parent / name for name in (form, f"{form}-shuffle"))
        said = run(1, "export", evaluated, "--to", paths[form], "--format", form, timeout=240)[0].out
        assert "2 student(s)" in said and (form != "onnx" or "on 41 validation images" in said), said
        if form == "onnx":  # whose exporter this process imports anyway
            export(evaluated, paths[f"{form}-shuffle"], "shuffle", form, Console(quiet=True))
        else:
            run(1, "export", evaluated, "--to", paths[f"{form}-shuffle"], "--format", form, "--student", "shuffle")
    return paths


@pytest.fixture(scope="module")
def digits(tiny) -> torch.Tensor:
    """uint8 [480, 1, 8, 8]"""
    return torch.from_numpy(np.load(tiny.parent / "digits.npz")["x"])[:, None]


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory) -> Path:
    """A folder of 70 digits as image files, more than a batch."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(digits[:70]):
        (folder / f"{index % 10}").mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{index % 10}" / f"{index:02d}.png")
    return folder


def rows_of(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


@pytest.mark.parametrize("student", [None, "shuffle"])
def test_every_format_predicts_what_the_run_predicts(exports, digits, student):
    wanted = open_classifier(exports["run"], student).logits(digits).softmax(1)
    places = [exports[form] for form in ("safetensors", "hub")]
    places += [exports["onnx"], exports["onnx"] / "ensemble.onnx"] if student is None else \
        [exports[f"{form}-shuffle"] for form in ("safetensors", "onnx", "hub")]
    if student:
        places += [exports["safetensors"] / f"{student}{ending}" for ending in (".safetensors", ".json")]
        places.append(exports[f"hub-{student}"] / "model.safetensors")
    for place in places:
        found = open_classifier(place, student)
        assert found.classes == [str(digit) for digit in range(10)]
        probabilities = found.logits(digits).softmax(1)
        torch.testing.assert_close(probabilities, wanted, rtol=0, atol=1e-4)
        assert torch.equal(probabilities.argmax(1), wanted.argmax(1)), place


def test_an_export_of_weights_in_several_files_goes_by_any_of_their_names(exports, digits, tmp_path):
    index = in_several_files(exports["safetensors"] / "mobile", tmp_path / "mobile")
    wanted = open_classifier(exports["safetensors"], "mobile").logits(digits)
    for place in (index, tmp_path / "mobile.json"):
        assert torch.equal(open_classifier(place, None).logits(digits), wanted)
    (tmp_path / "mobile.json").unlink()
    assert "is no .onnx file" in refused(1, "predict", index, "x.png")


def test_an_onnx_file_takes_uint8_batches_of_any_size_and_tells_its_classes_and_preprocessing(exports, digits):
    session = onnxruntime.InferenceSession(exports["onnx"] / "ensemble.onnx", providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 1, 8, 8])
    assert (logits.name, logits.shape) == ("logits", ["batch", 10])
    whole = session.run(None, {"images": digits[:7].numpy()})[0]
    for index in range(7):
        np.testing.assert_allclose(session.run(None, {"images": digits[index:index + 1].numpy()})[0], whole[index:index + 1],
                                   atol=1e-4)
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["classes"] == [str(digit) for digit in range(10)] and list(said["students"]) == ["mobile", "shuffle"]
    assert said["checked"] == "against the original to 0.0001 on 41 validation images"
    assert said["students"]["mobile"]["mean"] == [0.5] and said["preprocessing"].startswith("inside the graph: uint8")
    assert str(REPOSITORY).encode() not in (exports["onnx"] / "ensemble.onnx").read_bytes()


def test_an_onnx_file_resizes_repeats_grey_and_normalises_as_the_network_does(tmp_path):
    """One of torchvision's networks, which takes larger images than there are, and in colour."""
    model = Model(name="squeezenet1_1", input_size=40, mean=(0.2, 0.3, 0.4), std=(0.9, 0.5, 0.7))
    torch.manual_seed(0)
    network = build(model, 4, 1, (12, 17)).eval()
    facts = {"name": "wide", **description(model, tuple("abcd"), 1, (12, 17), network)}
    export_onnx(RunFolder(tmp_path), [(network, facts)], tmp_path, Console(quiet=True), random_images=True)
    found = open_classifier(tmp_path, None)
    assert (found.channels, found.view_size) == (1, (12, 17)) and network.channels == 3
    for count in (1, 5):
        images = torch.randint(256, (count, 1, 12, 17), dtype=torch.uint8)
        with torch.inference_mode():
            wanted = network(images)
        assert wanted.std() > 0.01, "no difference would show"
        torch.testing.assert_close(found.logits(images), wanted, rtol=0, atol=1e-4)


def test_a_card_says_what_the_students_were_distilled_from():
    def source(*classes: int) -> str:
        teachers = {str(index): {"classes": ["x"] * count} for index, count in enumerate(classes)}
        return _source({"teachers": teachers}, {"classes": ["x"] * 4})
    assert source() == "trained by pkd from labels only"
    assert source(4) == "distilled by pkd from one teacher that knows every class"
    assert source(4, 4, 4) == "distilled by pkd from 3 teachers, each of which knows every class"
    assert "a pyramid of teachers" in source(4, 2, 2)


def test_class_names_are_text_in_a_card_and_a_view_that_is_not_square_is_left_to_the_reader():
    facts = {"view_size": (8, 12), "channels": 1, "classes": ["a*b", "<c>", "d_e|f"], "input_size": (8, 12), "mean": [0.5],
             "std": [0.5]}
    assert r"a\*b, \<c\>, d\_e\|f." in _data(load_recipe("digits"), facts, {})[0]
    said = _preprocessing(facts)
    assert not said["do_resize"] and not said["do_center_crop"] and said["crop_size"] == {"height": 8, "width": 12}
    square = _preprocessing({**facts, "view_size": (8, 8)})
    assert square["do_resize"] and square["do_center_crop"]


def test_students_are_those_of_an_arm_whichever_way_the_recipe_says_it():
    def effect(*changes):
        return _effect({"recipe": identity(load_recipe("digits", changes))})
    known, _ = built_in(load_recipe("digits"), (10, 1, (8, 8)), tuple("0123456789"), 1456)
    arms = {arm.name: effect(*arm.changes, "seed=3") for arm in known}
    assert effect("objective.kind=top") == arms["top"] and effect() == arms["composed"]
    assert effect("objective.kind=alone", "teachers.lr=1") == arms["alone"], "nobody asks those teachers"
    assert effect("objective.kind=top", "teachers.lr=1") not in arms.values()
    assert len({str(own) for own in arms.values()}) == len(arms) and _effect({}) is None
    recorded = identity(load_recipe("digits"))
    assert _effect({"recipe": {**recorded, "dtypes": "bf16"}}) != arms["composed"] == _effect({"recipe": recorded})


def test_a_card_states_the_arms_of_a_study_where_there_is_one(evaluated, tmp_path):
    arms = ("top", 0.8, True), ("composed", 0.9, False)
    found = figures_of([made_up(arm, seed, accuracy, accuracy, control, 2.0) for seed in (0, 1)
                        for arm, accuracy, control in arms], ["top", "composed"])
    write_json(tmp_path / "other" / "study.json", found)
    mine = json.loads((evaluated / "run.json").read_text())["recipe"]
    fingerprint = json.loads((evaluated / "students" / "students.json").read_text())["fingerprint"]
    found |= {"study": {**mine, "seed": 0, "objective": {"kind": "top"}}, "fingerprint": fingerprint}
    found["arms"]["composed"]["title"] = 'own: classes=[["a|b", "<img src=x>"]]'
    write_json(tmp_path / "study" / "study.json", {**found, "recipe": "tiny"})
    write_json(tmp_path / "data" / "study.json", {**found, "recipe": "tiny", "fingerprint": "another"})
    longer = {**mine, "distill": {**mine["distill"], "epochs": 99}}
    write_json(tmp_path / "longer" / "study.json", {**found, "recipe": "tiny", "study": longer})
    for seed, recipe in ((4, {**mine, "seed": 4}), (5, longer)):
        write_json(tmp_path / "study" / "results" / f"composed-seed-{seed}.json", {"arm": f"mine-{seed}", "recipe": recipe})
    run(1, "export", evaluated, "--to", tmp_path / "hub", "--format", "hub", "--study", tmp_path / "study")
    text = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md").text
    assert "made as in the arm `mine-4`" in text and "read 4 times in all" in text
    assert r'| composed | own: classes=\[\["a\|b", "\<img src=x\>"\]\] | 0, 1 | 1.00 | ' in text
    assert "composed against top, the best control" in text
    assert "no study.json" in refused(1, "export", evaluated, "--to", tmp_path / "b", "--format", "hub", "--study", tmp_path)
    assert "is of recipe made-up" in refused(1, "export", evaluated, "--to", tmp_path / "b", "--format", "hub", "--study",
                                             tmp_path / "other")
    for name, word in (("longer", "distill.epochs is 2 in the recipe and 99 there"), ("data", "other images or another")):
        assert word in refused(1, "export", evaluated, "--to", tmp_path / "b", "--format", "hub", "--study", tmp_path / name)
    write_json(tmp_path / "begun" / "study.json", {**figures_of([], ["top"]), "recipe": "tiny"})
    assert "has no result yet" in refused(1, "export", evaluated, "--to", tmp_path / "b", "--format", "hub", "--study",
                                          tmp_path / "begun")
    assert "is for the model card" in refused(1, "export", evaluated, "--to", tmp_path / "b", "--study", tmp_path)
    assert not (tmp_path / "b").exists()


def test_a_hub_folder_has_a_card_that_states_data_objective_figures_and_seeds(exports):
    card = huggingface_hub.ModelCard.load(exports["hub"] / "README.md")
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "pkd"
    summary = json.loads((exports["run"] / "summary.json").read_text())
    figures = {own.metric_type: own.metric_value for own in card.data.eval_results}
    assert figures["accuracy"] == summary["ensemble"]["accuracy"]
    alone = huggingface_hub.ModelCard.load(exports["hub-shuffle"] / "README.md")
    assert alone.data.eval_results[0].metric_value == summary["students"]["shuffle"]["accuracy"]
    for words in ("Data set `npz`", "`composed` (temperature 4", "seed 0", "level2-2", "mobile |", "48 test images"):
        assert words in card.text, words
    top = {path.name for path in exports["hub-shuffle"].iterdir()}
    assert top == {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"}
    assert {path.name for path in (exports["hub"] / "mobile").iterdir()} == top - {"README.md"}
    config = json.loads((exports["hub-shuffle"] / "config.json").read_text())
    assert config["id2label"]["3"] == "3" and config["architecture"] == "pkd_shuffle"


def answer(code: str, place: Path) -> dict[str, float]:
    """What a program without pkd prints, started in `place`: class -> probability."""
    said = subprocess.run([sys.executable, "-I", "-c", WITHOUT_PKD + code], cwd=place, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return ast.literal_eval(said.stdout)


def agrees(found: dict[str, float], wanted: dict) -> bool:
    """wanted: a row of the table that pkd predict writes."""
    name = max(found, key=found.get)
    return name == wanted["class"] and found[name] == pytest.approx(float(wanted["probability"]), abs=1e-5)


def readme_snippet(path: Path) -> str:
    return re.search(r"```python\n(import json\n.*?)```", path.read_text(), re.S)[1]


def test_the_readmes_snippet_loads_students_and_ensemble_into_plain_torchvision(tiny, new_run, digits, tmp_path):
    folder, teachers_from = new_run("run")
    run(1, "distill", tiny, "--run-folder", folder, teachers_from, "--steps", 2,
        "students.0.model={name: shufflenet_v2_x0_5, input_size: 24, mean: [0.2, 0.3, 0.4]}",
        "students.1.model=shufflenet_v2_x0_5")
    run(1, "evaluate", folder, "--steps", 5)
    run(1, "export", folder, "--to", tmp_path / "exported")
    run(1, "export", folder, "--to", tmp_path / "hub", "--format", "hub")
    # Neither of the right size nor of the right mode, so that all of the preprocessing counts.
    Image.fromarray(digits[3, 0].numpy()).resize((23, 38)).convert("RGB").save(tmp_path / IMAGE)
    run(1, "predict", folder, tmp_path / IMAGE, "--csv", tmp_path / "said.csv")
    run(1, "predict", folder, tmp_path / IMAGE, "--student", "mobile", "--csv", tmp_path / "mobile.csv")
    wanted, alone = (rows_of(tmp_path / name)[0] for name in ("said.csv", "mobile.csv"))
    card = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.eval_results is None and "A smoke run" in card.text, "nor may programs take its figures for results"
    shutil.copy(tmp_path / IMAGE, tmp_path / "hub" / "image.png")
    for place, readme in ((tmp_path, REPOSITORY / "README.md"), (tmp_path / "hub", tmp_path / "hub" / "README.md")):
        code = readme_snippet(readme)
        assert code.count("\n") == SNIPPET.count("\n")
        assert sum(bool(line) and "import" not in line for line in code.splitlines()) <= 10
        assert agrees(answer(code, place), wanted)
    run(1, "export", folder, "--to", tmp_path / "one", "--format", "hub", "--student", "mobile")
    shutil.copy(tmp_path / IMAGE, tmp_path / "one" / "image.png")
    assert agrees(answer(readme_snippet(tmp_path / "one" / "README.md"), tmp_path / "one"), alone)


def test_small_models_load_without_pkd_from_the_one_file_that_defines_them(exports, pictures, tmp_path):
    shutil.copytree(exports["safetensors"], tmp_path / "exported")
    shutil.copy(REPOSITORY / "pkd" / "small_models.py", tmp_path / "small_models.py")
    image = pictures / "3" / "03.png"
    shutil.copy(image, tmp_path / IMAGE)
    run(1, "predict", exports["run"], image, "--csv", tmp_path / "said.csv")
    theirs = "from torchvision.models import get_model"
    code = readme_snippet(REPOSITORY / "README.md")
    assert theirs in code and 'get_model(facts["architecture"]' in code
    code = code.replace(theirs, "import sys\nsys.path.insert(0, '.')\nfrom small_models import SMALL_MODELS")
    code = code.replace('get_model(facts["architecture"]', 'SMALL_MODELS[facts["architecture"]](')
    assert agrees(answer(code.replace("](,", "]("), tmp_path), rows_of(tmp_path / "said.csv")[0])


def test_predict_goes_through_folders_and_writes_a_table(exports, pictures, tmp_path):
    run(1, "predict", exports["hub"], pictures, "--csv", tmp_path / "all.csv", "--top", 3)
    rows = rows_of(tmp_path / "all.csv")
    assert [row["image"] for row in rows] == [str(path) for path in sorted(pictures.rglob("*.png"))]
    assert list(rows[0]) == ["image", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    assert all(float(row["probability"]) >= float(row["probability_2"]) >= float(row["probability_3"]) for row in rows)
    strange = os.fsdecode(b"caf\xe9.csv")
    run(1, "predict", exports["hub"], pictures, "--csv", tmp_path / strange, "--top", 3)
    assert rows_of(tmp_path / strange) == rows
    before = (tmp_path / "all.csv").read_bytes()
    assert "all.csv already exists" in refused(1, "predict", exports["hub"], pictures, "--csv", tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_bytes() == before
    for words, many in ((("--top", 99), 10), ((), 5)):  # no more classes than there are; five by default
        said = run(1, "predict", exports["onnx"], pictures / "3" / "03.png", *words)[0].out
        assert len(re.findall(r"\d\.\d{4}", said)) == many


def test_images_that_cannot_be_read_are_counted_and_named_and_nothing_is_written(exports, pictures, tmp_path):
    mine = tmp_path / "pictures"
    shutil.copytree(pictures, mine)
    for file in [*(mine / "1").iterdir(), *(mine / "9").iterdir()]:
        file.write_bytes(b"no image")
    said = refused(1, "predict", exports["run"], mine, tmp_path / "missing.png", "--csv", tmp_path / "all.csv")
    assert "15 of 71 image(s)" in said and "01.png" in said and "and 5 more" in said and not (tmp_path / "all.csv").exists()
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(1, "predict", exports["run"], tmp_path / "empty")


def test_what_is_no_export_is_refused_unread(exports, pictures, tmp_path):
    image = pictures / "3" / "03.png"
    assert "neither a run folder" in refused(1, "predict", pictures, image)
    assert "does not exist" in refused(1, "predict", tmp_path / "nothing", image)
    shutil.copy(exports["safetensors"] / "mobile.safetensors", tmp_path)
    assert "mobile.json and mobile.safetensors both there" in refused(1, "predict", tmp_path / "mobile.safetensors", image)
    assert "one network of mobile, shuffle" in refused(1, "predict", exports["onnx"], image, "--student", "shuffle")
    assert "neither a run folder" in refused(1, "predict", ".", image, cwds=[pictures])
    assert "student shuffle" in refused(1, "predict", exports["safetensors"] / "mobile.json", image, "--student", "shuffle")
    (tmp_path / "trap.onnx").write_bytes(pickle.dumps({}))
    assert "cannot be read as ONNX" in refused(1, "predict", tmp_path / "trap.onnx", image)
    shutil.copytree(exports["hub-shuffle"], tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "architecture": "payload:Net"}))
    assert "names code, 'payload:Net'" in refused(1, "predict", tmp_path / "hub", image)
    assert "payload:Net' could not be imported" in refused(1, "predict", tmp_path / "hub", image, "--trust-code")
    (tmp_path / "ensemble.json").write_text(json.dumps({"students": ["../run"]}))
    assert "of its own folder" in refused(1, "predict", tmp_path, image)


def test_an_export_is_whole_or_absent_and_overwrites_nothing(exports, finished, tmp_path):
    for form in ("safetensors", "onnx", "hub"):
        before = {path: path.read_bytes() for path in exports[form].rglob("*") if path.is_file()}
        assert "not empty" in refused(1, "export", exports["run"], "--to", exports[form], "--format", form)
        assert {path: path.read_bytes() for path in exports[form].rglob("*") if path.is_file()} == before
    shutil.copytree(finished, tmp_path / "unread", ignore=shutil.ignore_patterns("summary.json"))
    assert "pkd evaluate first" in refused(1, "export", tmp_path / "unread", "--to", tmp_path / "hub", "--format", "hub")
    shutil.rmtree(tmp_path / "unread")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "whole").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["empty", "empty/whole"]


def test_an_onnx_file_is_checked_on_real_images_wherever_they_are_now(evaluated, tiny, tmp_path, capsys):
    moved, words = tmp_path / "images.npz", ("--to", tmp_path / "out", "--format", "onnx")
    shutil.copy(tiny.parent / "digits.npz", moved)
    said = refused(1, "export", evaluated, *words, f"data.path={tmp_path / 'gone.npz'}")
    assert "gone.npz" in said and "add data.path=" in said and not (tmp_path / "out").exists()
    assert "is for the images" in refused(1, "export", evaluated, "--to", tmp_path / "out", f"data.path={moved}")
    assert "is for the images" in refused(1, "export", evaluated, "--to", tmp_path / "out", "--random-images")
    export(evaluated, tmp_path / "out", "shuffle", "onnx", Console(), overrides=[f"data.path={moved}"])
    assert "on 41 validation images" in capsys.readouterr().out


class Restless(nn.Module):
    """Never says the same twice, and so cannot be said to be exported."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1)) + torch.rand(1)


def test_an_onnx_file_that_says_something_else_is_not_written(tmp_path):
    network = build(Model(name="test_export:Restless"), 10, 1, (8, 8)).eval()
    facts = {"name": "restless", "classes": list("0123456789"), "channels": 1, "view_size": [8, 8], "architecture": "own",
             "input_channels": 1, "input_size": [8, 8], "mean": [0.5], "std": [0.5]}
    with pytest.raises(UserError, match=r"differ from the original's by up to \d"):
        export_onnx(RunFolder(tmp_path), [(network, facts)], tmp_path, Console(), random_images=True)
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named_with_their_remedy():
    with pytest.raises(UserError, match=r"need no_such_package.*pip install onnx"):
        need("onnx", "no_such_package")
