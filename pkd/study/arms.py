"""The arms of a study: what a recipe is compared with, each as changes to it; pure."""

import json
import re
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from pkd.cost import network_cost, training_flops
from pkd.errors import UserError, nearest
from pkd.objective import Constants, asked_names, constants
from pkd.pyramid import build_pyramid, foreseen
from pkd.recipe import Level, Name, Objective, Recipe

Shape = tuple[int, int, tuple[int, int]]  # classes, channels, (height, width)

LONGER = 1.05  # a pyramid that costs less than so many times its top buys no control of its own


@dataclass(frozen=True)
class Arm:
    """control: what a pyramid must beat to have paid. changes: "key.sub=value" each."""

    name: str
    title: str
    changes: tuple[str, ...]
    control: bool = False


def pyramid_flops(recipe: Recipe, shape: Shape, samples: int) -> tuple[float, float]:
    """What the recipe's whole pyramid costs, and its top alone; groups by confusion count as even shares. samples: training
    images that students see. Every teacher answers about all of them, whatever the recipe's objective: the dearest of its
    arms is what controls may cost and must cost.
    """
    costs, recipe = [], recipe.model_copy(update={"objective": Objective(kind="composed")})
    for level in recipe.pyramid:
        counts = [-(-shape[0] // level.teachers)] * level.teachers if level.classes is None else map(len, level.classes)
        costs.append(sum(teacher_flops(recipe, level, count, shape, samples) for count in counts))
    return sum(costs), costs[0]


def teacher_flops(recipe: Recipe, level: Level, classes: int, shape: Shape, samples: int,
                  labelled: int | None = None) -> float:
    """What one teacher costs that knows so many classes: its training, and its answers about all that students see, or of
    a specialist that is asked about its own classes only about those images whose label it knows. labelled: training images
    with a label, None for all.
    """
    cost = network_cost(level.model, classes, *shape[1:])
    asked = 1.0
    if constants(recipe, len(recipe.pyramid)).own and classes < shape[0]:
        asked = classes / shape[0] * (samples if labelled is None else labelled) / samples
    training = training_flops(cost, recipe.teachers.batch, level.steps or recipe.teachers.steps)
    return training + asked * cost.flops * answers(recipe, samples)


def answers(recipe: Recipe, samples: int) -> int:
    """Different views of training images that students see: a teacher says something of each once."""
    return samples * min(recipe.views.different or recipe.distill.epochs, recipe.distill.epochs)


def student_flops(recipe: Recipe, shape: Shape, samples: int) -> float:
    """What it costs to train all students on `samples` training images."""
    steps = recipe.distill.epochs * (samples // recipe.distill.batch)
    return sum(training_flops(network_cost(student.model, *shape), recipe.distill.batch, steps)
               for student in recipe.students)


def built_in(recipe: Recipe, shape: Shape, classes: tuple[str, ...],
             samples: int) -> tuple[list[Arm], dict[str, str]]:
    """The arms that every study has, and those that do not suit this recipe: name -> why. samples: training images that
    students see.
    """
    build_pyramid(foreseen(recipe.pyramid), classes, recipe.seed)  # one that cannot be built has no cost
    whole, top = pyramid_flops(recipe, shape, samples)
    ratio, steps = whole / top, recipe.training(0).steps
    count = max(2, int(ratio + 0.5))
    alone = recipe.pyramid[0].model_dump(mode="json", exclude_unset=True)
    free = {key: value for key, value in alone.items() if key != "steps"}  # as many as the arm's teachers.steps
    forward = network_cost(recipe.pyramid[0].model, *shape).flops

    def bought(cost: float) -> int:
        """Steps of a teacher of the top's kind that costs so much, its answers included."""
        return max(1, round((cost / forward - answers(recipe, samples)) / (3 * recipe.teachers.batch)))
    long, each, half = (bought(whole / teachers) for teachers in (1, count, 2))
    paper = recipe.objective.model_dump(mode="json", exclude_unset=True) if recipe.objective.kind == "paper" \
        else {"kind": "paper"}
    composed = recipe.objective.model_dump(mode="json", exclude_unset=True) | {"kind": "composed"} \
        if recipe.objective.kind == "composed" else {"kind": "composed"}
    only, labels = _as("pyramid", [alone]), {"kind": "alone"}
    soft, paper_20 = ({"kind": "top", "temperature": t, "weights": [weight]} for t, weight in ((4, 1), (20, 0.6)))
    its_paper = _constants(recipe, paper)
    joint = {"kind": "top", "temperature": its_paper.temperature, "weights": its_paper.weights[:1],
             "ensemble": its_paper.ensemble}
    # What the recipe's own constants gain is not the pyramid's, nor is what an ensemble loss gains: a single teacher has
    # them, too.
    like = joint if len(paper) > 1 else composed | {"kind": "top"}
    controls = [labels, soft, paper_20, *[joint] * any(its_paper.ensemble)]
    mine, known = _constants(recipe, like), [_constants(recipe, own) for own in controls]
    best = soft if mine == known[1] else like
    its = "temperature 4, weight 1" if best == soft else "the recipe's own constants"
    jointly = f"temperature {its_paper.temperature:g}, weight {its_paper.weights[0]:g}, with paper's ensemble loss"
    theirs = "the paper's objective" if len(paper) == 1 else "the paper's objective, the recipe's own constants"
    arms = [
        Arm("alone", "labels only", (only, _as("objective", labels)), True),
        Arm("top", "the top teacher, temperature 4, weight 1", (only, _as("objective", soft)), True),
        Arm("top-t20", "the top teacher, temperature 20, weight 0.6", (only, _as("objective", paper_20)), True),
        *[Arm("top-ensemble", f"the top teacher, {jointly}",
              (only, _as("objective", joint)), True)] * any(its_paper.ensemble),
        *[Arm("top-own", f"the top teacher, {its}", (only, _as("objective", like)), True)] * (mine not in known),
        Arm("peers", f"the mean of {count} teachers that know every class, each trained {each / steps:.2f} times as long",
            (_as("pyramid", [free] * count), f"teachers.steps={each}", _as("objective", composed)), True),
        *[Arm("peers-ensemble", f"peers, {jointly}", (_as("pyramid", [free] * count), f"teachers.steps={each}",
                                                      _as("objective", joint | {"kind": "composed"})), True)]
        * any(its_paper.ensemble),
        Arm("top-long", f"one top teacher, trained {long / steps:.1f} times as long, {its}",
            (_as("pyramid", [free]), f"teachers.steps={long}", _as("objective", best)), True),
        *[Arm("long-ensemble", f"one top teacher, trained {long / steps:.1f} times as long, {jointly}",
              (_as("pyramid", [free]), f"teachers.steps={long}", _as("objective", joint)), True)]
        * (any(its_paper.ensemble) and best != joint),
        Arm("peers-long", f"the mean of 2 teachers that know every class, each trained {half / steps:.1f} times as long",
            (_as("pyramid", [free] * 2), f"teachers.steps={half}", _as("objective", composed)), True),
        Arm("paper-plain", f"{theirs}, without its ensemble loss",
            (_as("objective", paper | {"ensemble": [0] * len(recipe.students)}),)),
        Arm("paper", theirs, (_as("objective", paper),)),
        Arm("composed", "the composed objective", (_as("objective", composed),)),
    ]
    if recipe.objective.kind in ("alone", "top") and constants(recipe, len(recipe.pyramid)) not in known:
        arms.append(Arm("recipe", "the recipe as it is", ()))
    out = _unsuitable(recipe, classes, ratio, count, {"peers": each, "peers-ensemble": each, "peers-long": half})
    return [arm for arm in arms if arm.name not in out], out


def _constants(recipe: Recipe, objective: dict) -> Constants:
    return constants(recipe.model_copy(update={"objective": Objective(**objective)}), len(recipe.pyramid))


def _unsuitable(recipe: Recipe, classes: tuple[str, ...], ratio: float, count: int,
                bought: dict[str, int]) -> dict[str, str]:
    """count: peers; bought: arm -> steps of each of its teachers."""
    out, steps = {}, recipe.training(0).steps
    for name, its in bought.items():
        if 2 * its < steps:
            out[name] = (f"the pyramid costs {ratio:.2f} times its top, much of it for answers: several of the top's kind "
                         f"would be trained for {its} of its {steps} steps each")
    if ratio < LONGER:
        for name in ("peers", "peers-ensemble"):
            out[name] = f"the pyramid costs {ratio:.2f} times its top, which buys no second teacher"
        for name in ("top-long", "long-ensemble"):
            out[name] = f"the pyramid costs {ratio:.2f} times its top, which buys no longer training"
    if count == 2:
        out["peers-long"] = f"the pyramid costs {ratio:.2f} times its top: two teachers are what peers has"
    pyramid = build_pyramid(recipe.pyramid, classes, recipe.seed)
    overlap = [level for level in sorted({t.level for t in pyramid.teachers}) if not pyramid.partitions(level)]
    if overlap:
        out["composed"] = f"pyramid.{overlap[0]} overlaps or leaves a class out"
    return out


def own_arm(text: str) -> Arm:
    """An arm of the user's, from "NAME=key=value key=value"; a change begins where a word reads key=. Raises UserError."""
    name, _, changes = text.partition("=")
    parts = [part for part in re.split(r"\s+(?=[A-Za-z_][\w.-]*=)", changes.strip()) if part]
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise UserError(f"--arm {text!r} names its arm {name!r}, which becomes a file name: use letters, digits, dots and "
                        "dashes, as in --arm soft=\"objective.temperature=2\"") from None
    if not parts or not all(re.match(r"[A-Za-z_][\w.-]*=", part) for part in parts):
        raise UserError(f"--arm {text!r} holds no changes: write --arm {name}=\"key.sub=value key.sub=value\"")
    return Arm(name, "own: " + " ".join(parts), tuple(parts))


def is_control(recipe: Recipe, classes: tuple[str, ...]) -> bool:
    """Whether an arm has no specialist that counts: then a pyramid must beat it, whoever thought of it."""
    its = constants(recipe, len(recipe.pyramid))
    if its.kind in ("alone", "top") or (its.kind == "paper" and not any(its.weights[1:])):
        return True
    pyramid = build_pyramid(foreseen(recipe.pyramid), classes, recipe.seed)
    return all(len(teacher.classes) == len(classes) for teacher in pyramid.teachers)


def choose(known: list[Arm], left_out: dict[str, str], own: list[Arm], wanted: list[str] | None) -> list[Arm]:
    """The arms of a study; wanted: names, None for all; the user's own are always in. Raises UserError."""
    names = [arm.name for arm in known]
    for index, arm in enumerate(own):
        if arm.name in (*names, *left_out, *(other.name for other in own[:index])):
            raise UserError(f"--arm {arm.name} names an arm that there is already: give it another name")
    for name in wanted or ():
        if name in left_out:
            raise UserError(f"arm {name} was asked for, but {left_out[name]}: leave it out of --arms")
        if name not in (*names, *(arm.name for arm in own)):
            every = [*names, *(arm.name for arm in own)]
            raise UserError(f"arm {name} was asked for, but the arms are {', '.join(every)}{nearest(name, every)}")
    return [arm for arm in known if wanted is None or arm.name in wanted] + own


def refuse_unequal(base: Recipe, arm: Arm, recipe: Recipe) -> None:
    """Raises UserError where an arm's students see or are something else, so that nothing could be compared."""
    both = [{"data": r.data, "views": r.views, "distill": r.distill, "seed": r.seed, "channels_last": r.channels_last,
             "students": r.students, "deepspeed.students": r.deepspeed.students,
             "placement.accumulation": r.placement.accumulation,
             "placement.student_groups": r.placement.student_groups or 1}
            for r in (base, recipe)]
    for key in both[0]:
        if both[0][key] != both[1][key]:
            raise UserError(f"arm {arm.name} changes {key}, but the students of all arms must be alike and see the same: "
                            "change the recipe for all of them, or make a study of its own")


def fitting_shards(recipe: Recipe) -> tuple[str, ...]:
    """A change that leaves teachers out of placement.shards which an arm does not ask."""
    names = asked_names(recipe.objective.kind, recipe.pyramid)
    kept = {name: ranks for name, ranks in recipe.placement.shards.items() if name in names}
    return (_as("placement.shards", kept),) if kept != recipe.placement.shards else ()


def _as(key: str, value) -> str:
    return f"{key}={json.dumps(value)}"
