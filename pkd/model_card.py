"""The model card of an export: what it was made of, what it reaches, how it is loaded; Markdown with YAML in front."""

import json
import re

import yaml

from pkd.objective import constants
from pkd.predictions import ENSEMBLE
from pkd.recipe import Recipe
from pkd.study.table import caveats

# As the README has it; a card names the files of its own folder.
FILE, LIST, IMAGE = "exported/{name}", 'json.load(open("exported/ensemble.json"))["students"]', "flower.jpg"
SNIPPET = """\
import json

from PIL import Image, ImageOps
from safetensors.torch import load_file
from torchvision.models import get_model
from torchvision.transforms import functional as F

def logits(name, image):
    facts = json.load(open(f"exported/{name}.json"))
    network = get_model(facts["architecture"], **facts["arguments"]).eval()
    network.load_state_dict(load_file(f"exported/{name}.safetensors"))
    image = ImageOps.fit(image.convert("RGB" if facts["channels"] == 3 else "L"), facts["view_size"][::-1], Image.BILINEAR)
    pixels = F.resize(F.to_tensor(image), facts["input_size"]).expand(facts["input_channels"], -1, -1)
    return facts["classes"], network(F.normalize(pixels, facts["mean"], facts["std"])[None])[0]

names = json.load(open("exported/ensemble.json"))["students"]  # or one student: ["mobile"]
answers = [logits(name, Image.open("flower.jpg")) for name in names]
print(dict(zip(answers[0][0], (sum(own for _, own in answers) / len(names)).softmax(0).tolist())))
"""
LISTED = 100  # classes; config.json has them all


def model_card(recipe: Recipe, summary: dict, students: list[dict], study: dict | None = None,
               arm: str | None = None) -> str:
    """students: their JSON files' contents, one or all of the run; summary: of summary.json; study: of study.json; arm: that
    of the study which the run is.
    """
    alone = len(students) == 1
    name = students[0]["name"] if alone else "ensemble"
    figures = summary["students"][name] if alone else summary["ensemble"]
    front = {
        "library_name": "pkd", "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", *sorted({own["architecture"] for own in students})],
        "metrics": ["accuracy"],
    }
    if summary["complete"]:  # else figures that programs read would be those of a smoke run
        front["model-index"] = [{"name": f"{recipe.name}-{name}", "results": [{
            "task": {"type": "image-classification"},
            "dataset": {"name": recipe.data.name, "type": recipe.data.name, "split": "test"},
            "metrics": [{"type": "accuracy", "value": figures["accuracy"], "name": "Accuracy"},
                        {"type": "loss", "value": figures["loss"], "name": "Cross-entropy"},
                        {"type": "ece", "value": figures["calibration_error"], "name": "Expected calibration error"}]}]}]
    what = f"student {name}" if alone else f"ensemble of {len(students)} students"
    parts = [
        "---", "# license: yours to choose; mind the licences of the data and of pretrained weights",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", "",
        f"# {recipe.name}: {what}", "",
        f"Image classification with {len(students[0]['classes'])} classes; {_source(summary, students[0])}.", "",
        "## Data", "", *_data(recipe, students[0], summary), "",
        "## Training", "", *_training(recipe, summary), "",
        "## Figures", "", *_figures(summary), "",
        *(["## Compared with", "", *_study(study, arm), ""] if study else []),
        "## How to load it", "", *_loading(students),
    ]
    return "\n".join(parts) + "\n"


def _source(summary: dict, facts: dict) -> str:
    teachers = summary["teachers"].values()
    every = sum(len(own["classes"]) == len(facts["classes"]) for own in teachers)
    if not teachers:
        return "trained by pkd from labels only"
    if every < len(teachers):
        return "distilled by pkd from a pyramid of teachers, one at the top that knows every class and specialists below it"
    which = "one teacher that" if every == 1 else f"{every} teachers, each of which"
    return f"distilled by pkd from {which} knows every class"


def _plain(text: str) -> str:
    """As text in Markdown, in a cell of a table, too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", " ".join(text.split()))


def _data(recipe: Recipe, facts: dict, summary: dict) -> list[str]:
    height, width = facts["view_size"]
    classes = [_plain(name) for name in facts["classes"]]
    more = f" and {len(classes) - LISTED} more" if len(classes) > LISTED else ""
    counts = summary.get("images", {})  # which earlier versions did not write down
    trained = f"; {counts['train']} images for training" if counts else ""
    trained += f" and {counts['unlabelled']} without a label" if counts.get("unlabelled") else ""
    trained += f", {counts['validation']} for validation, {summary['test_images']} for testing" if counts else ""
    return [f"Data set `{recipe.data.name}`, {'grey' if facts['channels'] == 1 else 'colour'} images of {height} x {width} "
            f"pixels (height x width){trained}; splits by seed {recipe.data.seed}. Classes, in the order of the logits: "
            f"{', '.join(classes[:LISTED])}{more}."]


def _training(recipe: Recipe, summary: dict) -> list[str]:
    chosen = constants(recipe, len(recipe.pyramid))
    asked = "no teachers" if chosen.kind == "alone" else \
        f"temperature {chosen.temperature:g}, weights {', '.join(f'{weight:g}' for weight in chosen.weights)}"
    pull = f", ensemble terms {', '.join(f'{own:g}' for own in chosen.ensemble)}" if any(chosen.ensemble) else ""
    if chosen.kind == "paper":
        about = "its own classes' samples" if chosen.own else "every sample"
        share = "divided by the batch's samples" if chosen.per_batch else "a mean over these"
        pull += f", each teacher asked about {about}, its term {share}"
    lines = [f"Objective `{chosen.kind}` ({asked}{pull}), seed {recipe.seed}, {recipe.distill.epochs} epochs in batches of "
             f"{recipe.distill.batch}; identity of the recipe `{summary['identity']}`."]
    if summary["teachers"]:
        lines += ["", "| teacher | level | classes | parameters | accuracy % within its classes |", "|---|---|---|---|---|"]
    return [*lines, *(f"| {name} | {own['level']} | {len(own['classes'])} | {own['parameters']:,} | "
                      f"{'-' if own['accuracy'] is None else format(100 * own['accuracy'], '.1f')} |"
                      for name, own in summary["teachers"].items())]


def _figures(summary: dict) -> list[str]:
    rows = [*summary["students"].items(), ("ensemble (mean of logits)", summary["ensemble"])]
    lines = [f"One run, seed {summary['seed']}, on {summary['test_images']} test images, read "
             f"{summary['test_readings']} time(s) so far; the weights that were kept are the best by validation.", ""]
    if not summary["complete"]:
        lines = ["**A smoke run: training or evaluation was cut short.**", "", *lines]
    return [*lines, "| | accuracy % | cross-entropy | calibration error | validation accuracy % | parameters |",
            "|---|---|---|---|---|---|",
            *(f"| {name} | {100 * own['accuracy']:.1f} | {own['loss']:.4f} | {own['calibration_error']:.4f} | "
              f"{100 * own['validation_accuracy']:.1f} | {own['parameters']:,} |" for name, own in rows)]


def _study(study: dict, arm: str | None) -> list[str]:
    """The arms, what decides between them, and what a reader must know of that."""
    def spread(figure: list) -> str:
        mean, sd = figure
        return f"{100 * mean:.1f}" + (f" ± {100 * sd:.1f}" if sd is not None else "")
    lines = [f"Arms of the study {study['recipe']}, equal students and training in all: accuracy in % of the ensemble on "
             f"{study['test_images']} test images, mean ± standard deviation over seeds; teachers' cost is the arithmetic "
             "of their training and answers, the pyramid's being 1. "
             + (f"These students are made as in the arm `{arm}`." if arm else "No result there is of students like these."),
             "",
             "| arm | what it is | seeds | teachers' cost | accuracy % |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {_plain(own['title'])} | {', '.join(map(str, own['seeds']))} | "
              f"{own['teacher_flops'] / study['pyramid_flops']:.2f} | {spread(own['networks'][ENSEMBLE]['accuracy'])} |"
              for name, own in study["arms"].items()]
    for one in study["differences"]:
        if one["decides"]:
            low, high = one["interval"]
            lines += ["", f"{one['arm']} against {one['against']}, the best control (both chosen by validation): "
                      f"{100 * one['difference']:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}."]
    read = f"the test split was read {study['test_readings']} times in all"
    return [*lines, "", *(f"- {text}." for text in (*caveats(study), read))]


def _loading(students: list[dict]) -> list[str]:
    lines = ["With pkd, for a folder that holds this one's files: `pkd predict FOLDER image.png`.", ""]
    libraries = {own["library"] for own in students}
    if "torchvision" in libraries:
        names = ["."] if len(students) == 1 else [own["name"] for own in students if own["library"] == "torchvision"]
        code = SNIPPET.replace(f"{FILE}.json", "{name}/config.json")
        code = code.replace(f"{FILE}.safetensors", "{name}/model.safetensors")
        code = code.replace(LIST, json.dumps(names)).replace(IMAGE, "image.png")
        of = "the students that torchvision has" if len(libraries) > 1 else "the students"
        code = code.replace('or one student: ["mobile"]', f"folders of {of}" if names != ["."] else "this folder")
        lines += ["With plain torchvision:", "", "```python", code.rstrip(), "```", ""]
    if "pkd" in libraries:
        lines += ["Architectures named `pkd_...` are in pkd's `small_models.py`, a file that needs nothing but torch: "
                  "`SMALL_MODELS[facts[\"architecture\"]](**facts[\"arguments\"])` in place of torchvision's `get_model`, "
                  f"the rest as {'above' if 'torchvision' in libraries else 'the README of pkd says for those'}.", ""]
    if "own" in libraries:
        lines += ["Architectures written as `package.module:Class` are its author's own, called with `arguments`.", ""]
    if len(students) > 1:
        lines += ["The ensemble's answer is the mean of all students' logits.", ""]
    return lines[:-1]
