r"""What the soft targets of trained teachers know, by validation images, before a student is trained from them.

    .venv/bin/python launch/weigh_targets.py RECIPE FOLDER [FOLDER ...] [--json FILE]

FOLDER: what `pkd teach` or `pkd study` (its teachers/*) filled with teachers of RECIPE's data. It
prints accuracy and cross-entropy of: every folder's teachers that know all classes; the mean of all of these together;
specialists beside the top within their classes; and the composed target for several weights of the specialists (pkd's own is
marked) and temperatures of theirs, with their own top and with each of the others; and for weights and temperatures that are
learned, on one half of the images and judged on the other, in turn. It reads no test image.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pkd.data import load_data
from pkd.errors import PassingError, UserError
from pkd.files import read_json, write_json
from pkd.loss import LevelTargets, composed_target
from pkd.network_file import read_network
from pkd.recipe_file import identity, load_recipe
from pkd.study.results import as_of_now
from pkd.weights_file import INDEX

WEIGHTS, TEMPERATURES = (0.25, 0.5, 0.75, 1.0), (1.0, 1.5, 2.0)
ROWS = 500
STEPS = 100  # of L-BFGS, for a few numbers
LARGEST = 10.0  # temperature that can be learned
RIDGE = 1e-3  # for few images that fit too well


@dataclass(frozen=True)
class Answers:
    name: str
    level: int
    classes: Tensor  # int64 [known]
    logits: Tensor  # fp32 [images, known]


def answers(folder: Path, images: Tensor, classes: list[str]) -> list[Answers]:
    """Of every teacher in a folder about uint8 images [n, channels, height, width]."""
    out = []
    for path in sorted((folder / "teachers").glob("*.json")):
        if path.name.endswith(INDEX):
            continue
        network, facts = read_network(path.with_suffix(""))
        strange = [name for name in facts["classes"] if name not in classes]
        if strange:
            raise UserError(f"teacher {path.stem} of {folder} knows class {strange[0]}, which the recipe's data have not: "
                            "give the recipe that it was trained by")
        known = torch.tensor([classes.index(name) for name in facts["classes"]])
        with torch.inference_mode():
            logits = torch.cat([network.eval()(part).float() for part in images.split(ROWS)])
        out.append(Answers(path.stem, facts["level"], known, logits))
    if not out:
        raise UserError(f"{folder} holds no teachers: give a folder that pkd teach filled")
    return out


def level(teachers: list[Answers], temperature: float) -> LevelTargets:
    """As the exchange hands them over: rows by teacher, then sample, padded to the widest."""
    images, width = len(teachers[0].logits), max(len(own.classes) for own in teachers)

    def padded(own: Tensor) -> Tensor:
        return F.pad(own.expand(images, -1), (0, width - own.shape[-1]))
    return LevelTargets(logits=torch.cat([padded(own.logits / temperature) for own in teachers]),
                        classes=torch.cat([padded(own.classes) for own in teachers]),
                        mask=torch.cat([padded(torch.ones(len(own.classes), dtype=torch.bool)) for own in teachers]),
                        sample=torch.arange(images).repeat(len(teachers)), share=torch.ones(images * len(teachers)),
                        teachers=len(teachers))


def composed(top: Tensor, specialists: list[Answers], weight: float, temperature: float) -> Tensor:
    """log P, fp32 [images, classes]: weight 0 is the top's alone, 1 the mean of the levels below by the chain rule."""
    levels = by_level(specialists)
    first = level([Answers("top", 0, torch.arange(top.shape[1]), top)], 1.0)
    mean = composed_target([first, *(level(own, temperature) for own in levels)], top.shape[1])
    top = F.log_softmax(top, 1)
    below = ((1 + len(levels)) * mean - top) / len(levels)
    return (1 - weight) * top + weight * below


def by_level(specialists: list[Answers]) -> list[list[Answers]]:
    return [[own for own in specialists if own.level == number] for number in sorted({own.level for own in specialists})]


def mean(*logits: Tensor) -> Tensor:
    return torch.stack([F.log_softmax(own, 1) for own in logits]).mean(0)


def weighted(top: Tensor, specialists: list[Answers], numbers: Tensor, number_of: list[int]) -> Tensor:
    """log P up to what a softmax takes away, fp32 [images, classes]: as composed(), for weights and temperatures of each.

    numbers: [1 + 2 * parts], the logarithm of the top's temperature, then weights, then logarithms of temperatures;
    number_of: the part of each specialist. Temperatures beyond a factor of LARGEST either way are taken to be that.
    """
    parts = max(number_of) + 1
    temperatures = numbers[[0, *range(1 + parts, 1 + 2 * parts)]].clamp(-math.log(LARGEST), math.log(LARGEST)).exp()
    top = F.log_softmax(top / temperatures[0], 1)
    out = top
    for own, part in zip(specialists, number_of):
        before = top[:, own.classes]
        chained = before.logsumexp(1, keepdim=True) + F.log_softmax(own.logits / temperatures[1 + part], 1)
        out = out.index_add(1, own.classes, numbers[1 + part] * (chained - before))
    return out


def fit(top: Tensor, specialists: list[Answers], labels: Tensor, number_of: list[int]) -> Tensor:
    """The numbers of weighted() of least cross-entropy, from pkd's own on."""
    parts, levels = max(number_of) + 1, len(by_level(specialists))
    start = torch.tensor([0.0, *[1 / (1 + levels)] * parts, *[0.0] * parts])
    numbers = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([numbers], max_iter=STEPS, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(weighted(top, specialists, numbers, number_of), labels)
        loss = loss + RIDGE * (numbers - start).square().sum()
        loss.backward()
        return loss
    optimizer.step(step)
    return numbers.detach()


def learned(top: Tensor, specialists: list[Answers], labels: Tensor, number_of: list[int]) -> Tensor:
    """log P of each half of the images, by the numbers that fit the other half."""
    half = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % 2
    out = torch.empty_like(top)
    for judged in (0, 1):
        seen, ours = half != judged, half == judged
        numbers = fit(top[seen], [replace(own, logits=own.logits[seen]) for own in specialists], labels[seen], number_of)
        mine = [replace(own, logits=own.logits[ours]) for own in specialists]
        out[ours] = weighted(top[ours], mine, numbers, number_of).log_softmax(1)
    return out


class Said(list[dict]):
    """What was printed: rows of name, accuracy as a share, cross-entropy in nats."""

    def say(self, name: str, log_probability: Tensor, labels: Tensor) -> None:
        right = (log_probability.argmax(1) == labels).float().mean().item()
        loss = F.cross_entropy(log_probability, labels).item()
        self.append({"name": name.strip(), "accuracy": right, "cross_entropy": loss})
        print(f"{100 * right:7.2f} %  {loss:7.4f}  {name}")


def within(said: Said, top: Tensor, own: Answers, labels: Tensor) -> None:
    """A specialist and the top restricted to its classes, on images of these."""
    mine = torch.isin(labels, own.classes)
    truth = (labels[mine][:, None] == own.classes).long().argmax(1)
    restricted = top[mine][:, own.classes]
    print(f"{own.name}, {len(own.classes)} classes:")
    for name, found in (("the top restricted to them", restricted), ("specialist", own.logits[mine]),
                        ("mean of both", mean(restricted, own.logits[mine]))):
        said.say(f"  {own.name}: {name}", found, truth)


def check_data(folder: Path, asked: dict) -> None:
    """Raises UserError where teachers were trained on other data: they may know these validation images."""
    if (folder / "run.json").exists():
        found = as_of_now(read_json(folder / "run.json")["recipe"])["data"]
        other = [key for key in asked if found.get(key, asked[key]) != asked[key]]
        if other:
            raise UserError(f"the teachers of {folder} were trained with data.{other[0]} = {found[other[0]]}, but in the "
                            f"recipe it is {asked[other[0]]}: give the recipe that they were trained by")


def check(folder: Path, whole: list[Answers], specialists: list[Answers], classes: int) -> None:
    """Raises UserError for a pyramid that lacks a teacher, or that the composed target does not suit."""
    for own in by_level(specialists):
        if not whole or sorted(torch.cat([one.classes for one in own]).tolist()) != list(range(classes)):
            raise UserError(f"{folder} lacks its top or a specialist of level {own[0].level}, or its groups overlap: wait "
                            "for pkd teach to finish, or give another folder")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args(words)
    try:
        if arguments.json and os.path.lexists(arguments.json):
            raise UserError(f"{arguments.json} already exists: give a new file with --json")
        images, said = weigh(arguments.recipe, arguments.folders)
        if arguments.json:
            write_json(arguments.json, {"validation_images": images, "rows": said})
    except (UserError, PassingError) as error:
        print(f"weigh_targets: {error}", file=sys.stderr)
        return 2
    return 0


def weigh(recipe: str, folders: list[Path]) -> tuple[int, Said]:
    """Validation images, and what is said of them."""
    asked = load_recipe(recipe)
    data = load_data(asked.data)
    ids = data.splits["validation"]
    for index, folder in enumerate(folders):
        if folder.name in (other.name for other in folders[:index]):
            raise UserError(f"two folders are called {folder.name}, by which figures are told apart: rename one, or give it "
                            "by a link")
        check_data(folder, identity(asked)["data"])
    images, labels, classes = data.images[ids], data.labels[ids], list(data.classes)
    tops: dict[str, Tensor] = {}
    pyramids: dict[str, list[Answers]] = {}
    said = Said()
    print(f"{len(ids)} validation images: accuracy, cross-entropy")
    for folder in folders:
        found = answers(folder, images, classes)
        whole = [own for own in found if len(own.classes) == len(classes)]
        for own in whole:
            said.say(f"{folder.name} {own.name}", own.logits, labels)
        if len(whole) > 1:
            said.say(f"{folder.name}, mean of {len(whole)}", mean(*(own.logits for own in whole)), labels)
        specialists = [own for own in found if len(own.classes) < len(classes)]
        if whole:
            tops[folder.name] = whole[0].logits
        if specialists:
            check(folder, whole, specialists, len(classes))
            pyramids[folder.name] = specialists
    for one, other in combinations(tops, 2):
        said.say(f"mean of {one} and {other}", mean(tops[one], tops[other]), labels)
    for name, specialists in pyramids.items():
        for own in specialists:
            within(said, tops[name], own, labels)
        levels = len(by_level(specialists))
        plain = levels / (1 + levels)
        for whose, top in tops.items():
            for temperature in TEMPERATURES if whose == name else (1.0,):
                for weight in sorted({*WEIGHTS, plain}):
                    mark = " <- pkd's" * (weight == plain and temperature == 1 and whose == name)
                    said.say(f"{name} composed with the top of {whose}: specialists' weight {weight:.3g}, temperature "
                             f"{temperature:g}{mark}", composed(top, specialists, weight, temperature), labels)
        for each, number_of in (("level", [own.level - min(one.level for one in specialists) for own in specialists]),
                                ("specialist", list(range(len(specialists))))):
            said.say(f"{name} composed, a weight and a temperature learned for each {each}",
                     learned(tops[name], specialists, labels, number_of), labels)
    return len(ids), said


if __name__ == "__main__":
    sys.exit(main())
