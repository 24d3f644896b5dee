"""No recipe, override or file whatsoever is a traceback: it works, or is refused in one line."""

import copy
import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_recipe import BASES, FULL, SMALL, follow, parse_and_follow, refusal, written

from pkd.recipe import Recipe
from pkd.recipe_file import load_recipe


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


# Made anew for every use, since a second mutation may write into one.
WEIRD = {
    "huge": lambda: 10**400, "thousands of digits": lambda: 10**5000, "minus huge": lambda: -(10**400),
    "2**63": lambda: 2**63, "zero": lambda: 0, "minus one": lambda: -1, "tiny": lambda: 1e-320, "great": lambda: 1e308,
    "nan": lambda: math.nan, "inf": lambda: math.inf, "minus inf": lambda: -math.inf, "true": lambda: True,
    "none": lambda: None, "empty": lambda: "", "long": lambda: "x" * 5000, "break": lambda: "a\nb", "nul": lambda: "\0",
    "surrogate": lambda: "\ud800", "bytes": lambda: b"\xff", "list": list, "lists": lambda: [[], [[]], [0, "0"]],
    "map": dict, "odd keys": lambda: {None: 1, b"k": 2, (1, 2): 3, 1.5: 4}, "deep": lambda: nested(300),
    "very deep": lambda: nested(20000), "complex": lambda: 1j, "object": object, "set": lambda: {1, 2},
}
WORDS = ("paper", "composed", "top", "alone", "own", "all", "random", "co-located", "dedicated", "zero0-bf16")
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 80), st.floats(), st.text(max_size=5), st.sampled_from(WORDS),
    st.lists(st.integers(-1, 11), max_size=4), st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=3))


def spots(tree: dict) -> list[tuple]:
    """(container, key) of every value in the tree; a loop, since the tree may be deeper than Python's stack."""
    found, stack = [], [tree]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            found.append((node, key))
            if isinstance(value, (dict, list)):
                stack.append(value)
    return found


def mutate(tree: dict, draw) -> None:
    node, key = (places := spots(tree))[draw(st.integers(0, len(places) - 1))]
    choice = draw(st.sampled_from(sorted(WEIRD)) | PLAIN)
    value = WEIRD[choice]() if isinstance(choice, str) and choice in WEIRD else choice
    action = draw(st.sampled_from(["replace", "delete", "add"]))
    if action == "replace":
        node[key] = value
    elif action == "delete":
        del node[key]
    elif isinstance(node, list):
        node.append(value)
    else:
        node[draw(st.sampled_from(["lrr", "teachers", "classes", "a\nb", "", 7, None, b"k"]))] = value


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mutation_of_a_recipe_works_or_is_refused_in_one_line(data):
    tree = copy.deepcopy(data.draw(st.sampled_from(BASES)))
    for _ in range(data.draw(st.integers(1, 3))):
        if spots(tree):
            mutate(tree, data.draw)
    parse_and_follow(tree)


@pytest.mark.parametrize("value", WEIRD.values(), ids=WEIRD)
def test_a_weird_value_anywhere_works_or_is_refused_in_one_line(value):
    for index in range(len(spots(FULL))):
        tree = copy.deepcopy(FULL)
        node, key = spots(tree)[index]
        node[key] = value()
        parse_and_follow(tree)


@pytest.mark.parametrize("override", [
    "seed", "=1", "", ".=1", "a..b=1", "students.2.lr=1", "students.-1.lr=1", "students.x.lr=1", "students.\u00b2.lr=1",
    "students.0.name.x=1", "name.x=1", "name.x.y=1", "seed=[", "seed=2001-99-99", "seed=0x_", "seed=!!int x",
    "seed=!!bool x", "seed=!!timestamp x", "seed=" + "9" * 5000, "seed=" + "[" * 5000, f"students.{'9' * 5000}.lr=1",
    "pyramid.1.classes.0.9=1", "se\ned=1", "objective.weights.0=1", "a\nb.c=1", "name.a\nb=1",
])
def test_an_override_that_makes_no_sense_is_refused_in_one_line(tmp_path, override):
    assert refusal(lambda: load_recipe(written(tmp_path, SMALL), [override])) is not None


KEYS = st.sampled_from([*Recipe.model_fields, "0", "1", "model", "lr", "classes", "replicas", "level0", "", "\u00b2"])
VALUES = st.sampled_from(["1", "[", "{a: 1}", "null", "2001-99-99", "0x_", "!!int x", "*a", "[[[]]]", "? [1]", "~"])


@given(override=st.text(max_size=30) | st.builds(
    lambda keys, value: ".".join(keys) + "=" + value, st.lists(KEYS, max_size=4), VALUES | st.text(max_size=8)))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_override_works_or_is_refused_in_one_line(tmp_path, override):
    refusal(lambda: follow(load_recipe(written(tmp_path, SMALL), [override])))


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "ignore"))
       | st.text("{}[]:,-?!&*#|>'\"%@`\n \t.0123_xeab", max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(content=b"seed: 2001-99-99")
@example(content=b"seed: 0b_")
@example(content=b"seed: !!float x")
@example(content=b"seed: !!bool x")
@example(content=b"seed: !!timestamp x")
@example(content=b"seed: " + b"9" * 5000)
@example(content=b"seed: 0x" + b"f" * 5000)
@example(content=b"[" * 5000)
@example(content=b"a: &x [*x]")
@example(content=b"seed: &x {b: *x}")
@example(content=b"\xff\xfe")
@example(content=b"")
def test_any_file_works_or_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    refusal(lambda: follow(load_recipe(str(path))))


@pytest.mark.parametrize("name", ["", ".", "/", "no such", "no/such.yaml", "a\nb", "\0", "x" * 5000])
def test_a_recipe_that_is_not_there_is_refused_in_one_line(name):
    assert refusal(lambda: load_recipe(name)) is not None
