"""A recipe from its YAML file and `key.sub=value` overrides; the first mistake becomes one sentence."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pkd.ds_config import arithmetic, check_shards, load_ds_config
from pkd.errors import UserError, nearest
from pkd.recipe import Recipe, part
from pkd.shipped import is_file, shipped_file, shipped_names


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in file `name`, or the shipped recipe of that name, with overrides such as "distill.epochs=3".

    Raises UserError for a missing or unreadable file, an unknown key, a value of the wrong type or range, a DeepSpeed
    configuration that is missing or cannot be used.
    """
    path = Path(name)
    if not is_file(path):
        path = shipped_file("recipes", path.stem + ".yaml") if path.name == name else None
    if path is None:
        raise UserError(f"recipe {name} was asked for, but there is no such file and no shipped recipe of that name"
                        f"{nearest(Path(name).stem, shipped_names('recipes'))}: "
                        f"shipped are {', '.join(shipped_names('recipes'))}")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name} cannot be read as text: {error}") from None
    tree = _yaml(content, f"recipe {name}")
    try:
        tree = _apart(tree)
    except RecursionError:
        raise UserError(f"recipe {name} nests its values too deeply to be one") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {name} must be a mapping of keys to values, found {type(tree).__name__}")
    for text in overrides:
        override(tree, text)
    recipe = parse_recipe(tree, name)
    identity(recipe)  # reads the DeepSpeed configurations that the recipe names
    check_shards(load_ds_config(recipe.deepspeed.shards), recipe.deepspeed.shards)
    return recipe


def parse_recipe(tree: dict, name: str = "the recipe") -> Recipe:
    """The typed recipe of plain data; UserError with the first mistake in it."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"recipe {name}: {_sentence(error.errors(include_url=False)[0])}") from None
    except RecursionError:
        raise UserError(f"recipe {name} nests its values too deeply to be one") from None


def identity(recipe: Recipe) -> dict:
    """The part of the recipe that decides the result, dtypes of the DeepSpeed configurations included."""
    dtypes = {role: arithmetic(load_ds_config(getattr(recipe.deepspeed, role), "cpu")) for role in ("students", "teachers")}
    return {**part(recipe, free=False), "dtypes": dtypes}


def digest(tree: Any) -> str:
    """sha256 (hex) of plain data in canonical JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(asked: dict, found: dict, prefix: str = "") -> str:
    """The first key in which two identities differ, with both values: 'distill.batch is 64 here and 32 there'."""
    for key in sorted(set(asked) | set(found)):
        a, b = asked.get(key), found.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if a != b:
                return difference(a, b, f"{prefix}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            if a != b:
                items = ({str(i): value for i, value in enumerate(side)} for side in (a, b))
                return difference(*items, f"{prefix}{key}.")
        elif a != b:
            return f"{prefix}{key} is {_short(a)} in the recipe and {_short(b)} there"
    return "nothing differs"


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception as error:  # besides YAMLError, its constructors let through ValueError, KeyError and others
        raise UserError(f"{what} cannot be read as YAML ({type(error).__name__}: {str(error)[:300]})") from None


def _apart(tree: Any) -> Any:
    """Every place with an object of its own, where anchors share one: an override is of one place."""
    if isinstance(tree, dict):
        return {key: _apart(value) for key, value in tree.items()}
    return [_apart(value) for value in tree] if isinstance(tree, list) else tree


def override(tree: dict, text: str) -> None:
    """Apply "key.sub=value" to plain recipe data; list items by index."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"override {text!r} must read key.sub=value")
    *parents, last = path.split(".")
    value = _yaml(value, f"override {text!r}: the part after =")
    node: Any = tree
    for key in parents:
        node = _child(node, key, text)
    if isinstance(node, list):
        node[_index(node, last, text)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {text!r}: {'.'.join(parents)} holds a single value, so it has no key {last!r}")


def _child(node: Any, key: str, text: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, text)]
    if not isinstance(node, dict):
        raise UserError(f"override {text!r}: {key!r} lies below a single value")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(node: list, key: str, text: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10) or int(key) >= len(node):
        raise UserError(f"override {text!r}: {key!r} must be an index from 0 to {len(node) - 1} of that list")
    return int(key)


def _sentence(error: dict) -> str:
    where = ".".join(str(step) for step in error["loc"]) or "the whole"
    if error["type"] == "extra_forbidden":
        section = _section(error["loc"][:-1])
        known = list(section.model_fields) if section else []
        return f"unknown key {where}{nearest(str(error['loc'][-1]), known)}; known here: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]}, found {_short(error['input'])}"


def _section(location: tuple) -> type[BaseModel] | None:
    """The section class that a location such as ("students", 0, "model") lies in."""
    section: Any = Recipe
    for step in location:
        if isinstance(step, int):
            continue
        field = section.model_fields.get(step) if section else None
        section = _model_in(field.annotation) if field else None
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_in(a) for a in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model), None)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested as deep
        return "something too long to print"
    return text if len(text) <= 60 else text[:57] + "..."
