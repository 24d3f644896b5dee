"""A trained network on disk: weights as safetensors, and a JSON that says all that is needed to use them."""

import hashlib
from pathlib import Path

import torch

from pkd.data import DataSet
from pkd.errors import UserError
from pkd.files import read_json, write_bytes, write_json
from pkd.models import Network, build, description
from pkd.pyramid import Teacher
from pkd.recipe import Model, Recipe, part
from pkd.recipe_file import digest, identity
from pkd.weights_file import Weights, weights_of, write_weights


def fresh(model: Model, classes: int, data: DataSet, seed: int, name: str) -> Network:
    """A network whose random weights are a function of (seed, name) alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, name))
        return build(model, classes, data.channels, data.size)


def derived_seed(seed: int, *parts) -> int:
    """An independent 63-bit seed for a named purpose."""
    text = ":".join(map(str, (seed, *parts))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def teacher_identity(recipe: Recipe, teacher: Teacher, data: DataSet) -> str:
    """Hash of all that decides a teacher's weights."""
    whole = identity(recipe)
    views = {key: value for key, value in whole["views"].items() if key != "finite"}  # which is the students' limit
    training = whole["teachers"] | {"forward": "fp32",  # the arithmetic of their answers, later
                                    "steps": recipe.training(teacher.level).steps}
    return digest({"seed": recipe.seed, "data": whole["data"], "views": views, "teachers": training,
                   "dtype": whole["dtypes"]["teachers"], "channels_last": recipe.channels_last,
                   "fingerprint": data.fingerprint, "model": part(teacher.model, free=False),
                   "classes": list(teacher.classes)})


def write_network(path: Path, network: Network, model: Model, classes: list[str], data: DataSet,
                  facts: dict) -> None:
    """Write <path>'s weights (pkd.weights_file says where), then <path>.json, whose presence says that both are there.

    network: a Network, its weights fp32; the file holds its backbone's, under the names that plain torchvision uses.
    facts: what else the JSON should hold.
    """
    weights = Weights(write_weights(path, network.backbone.state_dict()))
    tree = description(model, classes, data.channels, data.size, network)
    write_json(path.with_name(path.name + ".json"), {**tree, **facts, "sha256": weights.sha256()})


def read_network(path: Path, stem: Path | None = None) -> tuple[Network, dict]:
    """The network of <path>.json, in eval mode, and its weights, which are named after `stem` where that is another.

    Raises UserError where they are missing or do not agree.
    """
    facts = read_json(path.with_name(path.name + ".json"))
    if stem is None and facts.get("name") != path.name:  # by which others will be written
        raise UserError(f"{path}.json describes a network of another name, {str(facts.get('name'))[:100]!r}: restore it")
    weights = Weights(weights_of(stem or path))
    _check_hash(weights, facts, path)
    network = rebuild(facts, path)
    _check_tensors(network, weights, facts)
    network.backbone.load_state_dict(weights.all())
    return network.eval(), facts


def rebuild(facts: dict, path: Path, empty: bool = False) -> Network:
    """The architecture that a network's JSON describes, with random weights or, `empty`, without any (see build)."""
    try:
        resized = facts["input_size"] != facts["view_size"]
        model = Model(name=facts["architecture"], width=facts["width"], mean=tuple(facts["mean"]),
                      std=tuple(facts["std"]), input_size=facts["input_size"][0] if resized else None)
        return build(model, len(facts["classes"]), facts["channels"], tuple(facts["view_size"]), empty)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}.json does not describe a network ({error}): restore it or train it again") from None


def read_teacher(folder: Path, recipe: Recipe, teacher: Teacher, data: DataSet, complete: bool) -> tuple[Network, dict]:
    """A trained teacher, checked against what the recipe asks for. Raises UserError.

    complete: refuse a teacher whose training was cut short by --steps.
    """
    path = _trained(folder, teacher)
    network, facts = read_network(path)
    _check_teacher(facts, folder, recipe, teacher, data, complete)
    return network, facts


def open_teacher(folder: Path, recipe: Recipe, teacher: Teacher, data: DataSet,
                 complete: bool) -> tuple[Network, Weights]:
    """A trained teacher for ranks that must not hold all of it: the network, empty (see build), and its weights.

    With the checks of read_teacher but for the weights' hash, which teacher_hash looks at.
    """
    path = _trained(folder, teacher)
    facts, weights = read_json(path.with_name(path.name + ".json")), Weights(weights_of(path))
    _check_teacher(facts, folder, recipe, teacher, data, complete)
    network = rebuild(facts, path, empty=True)
    _check_tensors(network, weights, facts)
    return network, weights


def teacher_hash(folder: Path, recipe: Recipe, teacher: Teacher, data: DataSet, complete: bool) -> str:
    """sha256 of a trained teacher's weights, with the checks of read_teacher, but without making the network."""
    path = _trained(folder, teacher)
    facts = read_json(path.with_name(path.name + ".json"))
    _check_teacher(facts, folder, recipe, teacher, data, complete)
    _check_hash(Weights(weights_of(path)), facts, path)
    return facts["sha256"]


def _check_hash(weights: Weights, facts: dict, path: Path) -> None:
    if weights.sha256() != facts.get("sha256"):
        raise UserError(f"{weights.path} is not the file that {path.name}.json was written for (another sha256): restore "
                        f"it, or delete {path.name}.json and train it again")


def _check_tensors(network: Network, weights: Weights, facts: dict) -> None:
    own, found = network.backbone.state_dict(), set(weights.names)
    missing, unknown = [name for name in own if name not in found], [name for name in weights.names if name not in own]
    if missing or unknown:
        raise UserError(f"{weights.path} does not hold the weights of {facts.get('architecture')} "
                        f"({len(missing)} missing, {len(unknown)} unknown): delete its JSON and train it again")
    for name, tensor in own.items():
        if weights.shape(name) != list(tensor.shape):
            raise UserError(f"{weights.path} holds {name} of shape {weights.shape(name)}, and {facts.get('architecture')} "
                            f"needs {list(tensor.shape)}: delete its JSON and train it again")


def _trained(folder: Path, teacher: Teacher) -> Path:
    path = folder / teacher.name
    if not path.with_name(path.name + ".json").exists():
        raise UserError(f"teacher {teacher.name} is not in {folder}: run pkd teach first")
    return path


def _check_teacher(facts: dict, folder: Path, recipe: Recipe, teacher: Teacher, data: DataSet, complete: bool) -> None:
    if facts.get("class_ids") != list(teacher.classes):
        raise UserError(f"teacher {teacher.name} in {folder} knows classes {_few(facts.get('class_ids'))}, but the "
                        f"pyramid gives it {_few(list(teacher.classes))}: run pkd teach again in another --run-folder")
    if facts.get("identity") != teacher_identity(recipe, teacher, data):
        raise UserError(f"teacher {teacher.name} in {folder} was trained on other data or by other settings than the "
                        "recipe's: run pkd teach in another --run-folder")
    steps = recipe.training(teacher.level).steps
    if complete and facts["steps"] < steps:
        raise UserError(f"teacher {teacher.name} in {folder} was trained for {facts['steps']} of "
                        f"{steps} steps: run pkd teach to finish it, or pass --steps for a smoke run")


def _few(ids: list | None) -> str:
    text = str(ids)
    return text if len(text) < 60 else text[:50] + f"... ({len(ids)} in all)"


def copy_network(source: Path, target: Path) -> None:
    """Copy a network's files to `target`, of the same name, the JSON last."""
    read_network(source)  # what is damaged is not handed on
    weights = Weights(weights_of(source))
    for path in dict.fromkeys([*weights.files, weights.path, source.with_name(source.name + ".json")]):
        write_bytes(target.with_name(path.name), path.read_bytes())
