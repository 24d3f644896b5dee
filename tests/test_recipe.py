"""The recipe: what a mistake is told, how overrides reach it, and what belongs to its identity."""

import copy
import json
import pickle
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from workloads import work_of

from pkd.ds_config import arithmetic, check_clip, check_compiler, engine_config, load_ds_config, precision, stage
from pkd.errors import UserError
from pkd.objective import asked, constants
from pkd.placement import place
from pkd.pyramid import build_pyramid
from pkd.recipe import Recipe, Section
from pkd.recipe_file import difference, digest, identity, load_recipe, parse_recipe
from pkd.simulator import simulate
from pkd.system import Prediction, System

CLASSES = tuple(f"class {c}" for c in range(10))
SMALL = {
    "name": "small", "data": {"name": "digits"}, "objective": {"kind": "paper"},
    "views": {"affine": {"degrees": 10}, "randaugment": {"operations": 1}},
    "pyramid": [{"model": "mlp", "teachers": 1}, {"model": {"name": "mlp"}, "classes": [[0, 1, 2], [3, 4, "class 5"]]}],
    "students": [{"name": "a", "model": "mlp"}, {"name": "b", "model": {"name": "mlp", "width": 0.5}}],
    "placement": {"replicas": {"level0": 1}}, "timeouts": {}, "deepspeed": {"students": "zero1"},
}
FULL = parse_recipe(SMALL).model_dump(mode="json")  # every key there is
SIMULATED: dict[bytes, Prediction] = {}
BASES = (SMALL, FULL, {**FULL, "objective": {"kind": "composed"}, "pyramid": FULL["pyramid"][:1]})


def refusal(action) -> str | None:
    """What `action` refuses as one line, None if it accepts; anything but a UserError passes through."""
    try:
        action()
    except UserError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1
        return message
    return None


def follow(recipe: Recipe) -> None:
    """Everything pure that a run derives from its recipe, on 1, 2 and 5 ranks."""
    digest(identity(recipe))
    pyramid = build_pyramid(recipe.pyramid, CLASSES, recipe.seed)
    assert pyramid.levels == len(recipe.pyramid)
    constants(recipe, pyramid.levels)
    costs = {pyramid.teachers[t].name: 1.0 + t for t in asked(recipe.objective.kind, pyramid)}
    with patch("pkd.planner.simulate", simulated_once):
        for world in (1, 2, 5):
            refusal(lambda world=world: place(recipe, world, work_of(recipe, costs)))


def simulated_once(system: System) -> Prediction:
    """simulate(), a pure function, which would take most of the time: most recipes here come to the same few systems."""
    key = pickle.dumps(system)
    if key not in SIMULATED:
        SIMULATED[key] = simulate(system)
    return SIMULATED[key]


def parse_and_follow(tree: dict) -> str | None:
    return refusal(lambda: follow(parse_recipe(tree)))


def written(folder, tree: dict) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("base", BASES, ids=["small", "full", "composed"])
def test_the_recipes_that_are_mutated_are_valid_themselves(base):
    assert parse_and_follow(base) is None


def sections(section: Section, path: tuple = ()) -> list[tuple[tuple, list[str]]]:
    """(path, known keys) of a section and of all sections in it."""
    found = [(path, list(type(section).model_fields))]
    for key in found[0][1]:
        value = getattr(section, key)
        for step, inner in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if isinstance(inner, Section):
                found += sections(inner, (*path, key) if step is None else (*path, key, step))
    return found


SECTIONS = {".".join(map(str, path)) or "top": (path, keys) for path, keys in sections(parse_recipe(SMALL))}


@pytest.mark.parametrize(("path", "keys"), SECTIONS.values(), ids=SECTIONS)
def test_an_unknown_key_at_any_depth_is_refused_and_the_nearest_known_one_named(path, keys):
    for key in keys:
        tree = node = copy.deepcopy(FULL)
        for step in path:
            node = node[step]
        node[key + key[-1]] = 1
        message = parse_and_follow(tree)
        assert ".".join(map(str, (*path, key + key[-1]))) in message and f"did you mean {key!r}?" in message


@pytest.mark.parametrize(("override", "key"), [
    ("seed=x", "seed"), ("seed=-1", "seed"), ("data=7", "data"), ("data.name=mnist", "data.name"),
    ("distill.batch=many", "distill.batch"), ("distill.batch=0", "distill.batch"),
    ("distill.epochs=1.5", "distill.epochs"), ("students={}", "students"), ("students=[]", "students"),
    ("students.1.lr=fast", "students.1.lr"), ("students.0.lr=.nan", "students.0.lr"),
    ("students.0.name=../up", "students.0.name"), ("students.0.betas=[0.9, 0.99, 0.999]", "students.0.betas"),
    ("students.1.model.mean=[.nan]", "students.1.model.mean"), ("pyramid.0.teachers=[1]", "pyramid.0.teachers"),
    ("pyramid.1.classes=3", "pyramid.1.classes"), ("pyramid.1.classes=[]", "pyramid.1"), ("views.flip=7", "views.flip"),
    ("views.affine.degrees=.inf", "views.affine.degrees"), ("window=65", "window"), ("trace=often", "trace"),
    ("placement.replicas.level0=none", "placement.replicas.level0"),
])
def test_a_value_of_the_wrong_type_or_range_names_its_key(tmp_path, override, key):
    message = refusal(lambda: follow(load_recipe(written(tmp_path, SMALL), [override])))
    assert message is not None and f" {key}" in f" {message}" and not message.startswith("override")


@pytest.mark.parametrize(("change", "words"), [
    ({"students": [{"name": "a", "model": "m"}] * 2}, ["names must differ"]),
    *[({"students": [{"name": name, "model": "m"}]}, [f"named {name}"]) for name in ("ensemble", "students", "run")],
    ({"objective": {"kind": "paper", "weights": [1]}}, ["objective.weights", "2 numbers", "found 1"]),
    ({"objective": {"kind": "composed", "routes": "own"}}, ["objective.routes"]),
    ({"objective": {"kind": "top", "denominator": "batch"}}, ["objective.denominator", "paper objective only"]),
    ({"pyramid": [{"model": "m", "teachers": 1}, {"model": "m", "classes": [[0, 1]], "partition": "confusion"}]},
     ["pyramid.1", "its partition is confusion"]),
    ({"objective": {"kind": "paper", "ensemble": [1]}}, ["objective.ensemble", "(2)", "found 1"]),
    ({"pyramid": [{"model": "m"}]}, ["pyramid.0", "either teachers"]),
    ({"pyramid": [{"model": "m", "teachers": 1, "classes": [[0, 1]]}]}, ["pyramid.0", "not both"]),
    ({"teachers": {"nesterov": True, "momentum": 0}}, ["teachers", "nesterov needs a momentum"]),
])
def test_keys_that_do_not_fit_together_are_refused(change, words):
    message = parse_and_follow({**copy.deepcopy(SMALL), **change})
    assert message is not None and all(word in message for word in words)


def test_overrides_reach_into_maps_and_lists_and_make_the_maps_they_need(tmp_path):
    recipe = load_recipe(written(tmp_path, SMALL), [
        "distill.batch=32", "students.1.lr=0.5", "students.1.model.width=2", "views.affine.shear=3", "threads=2",
        "pyramid.1.classes=[[0, 1], [class 7, 8]]", "pyramid.1.classes.0.1=9", "objective.weights=[0.5, 1]",
        "data.path=null", "placement.replicas.level1-0=1"])
    assert recipe.distill.batch == 32 and recipe.threads == 2 and recipe.data.path is None
    assert [student.lr for student in recipe.students] == [0.05, 0.5] and recipe.students[1].model.width == 2
    assert (recipe.views.affine.degrees, recipe.views.affine.shear) == (10, 3)
    assert recipe.pyramid[1].classes == ((0, 9), ("class 7", 8)) and recipe.objective.weights == (0.5, 1)
    assert recipe.placement.replicas == {"level0": 1, "level1-0": 1}


def test_an_override_is_of_one_place_where_the_file_says_the_same_by_an_anchor(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "students": "HERE"}).replace("students: HERE", """students:
- &first {name: one, model: &net {name: pkd_mobile}, lr: 0.05}
- {<<: *first, name: two}
- {name: three, model: *net}"""))
    recipe = load_recipe(str(path), ["students.0.model.width=2"])
    assert [student.model.width for student in recipe.students] == [2, 1, 1]
    path.write_text("&all\n- *all\n")
    assert len(str(refusal_of(path)).splitlines()) == 1


def refusal_of(path) -> UserError:
    with pytest.raises(UserError) as refusal:
        load_recipe(str(path))
    return refusal.value


def changed(override: str) -> Recipe:
    """The small recipe, all its keys written out, with one override."""
    tree = copy.deepcopy(FULL)
    *parents, last = override.split("=")[0].split(".")
    node = tree
    for step in parents:
        node = node[int(step)] if isinstance(node, list) else node[step]
    node[int(last) if isinstance(node, list) else last] = yaml.safe_load(override.split("=")[1])
    return parse_recipe(tree)


FREE = (
    "name=other", "data.path=/elsewhere", "data.workers=9", "data.cache_gib=0", "placement.kind=co-located",
    "placement.student_ranks=3", "placement.replicas={level0: 2}", "placement.accumulation=2",
    "deepspeed.students=zero3", "deepspeed.teachers=zero0", "window=5", "answer_steps=2", "answer_rows=64",
    "ballot_every=10",
    "timeouts.start=1",
    "timeouts.step=1", "timeouts.group=1", "threads=4", "trace=true", "checkpoint_minutes=1", "compare_views=false",
    "teachers_from=runs/other", "data.download=true", "exchange=direct", "teacher_views=sent", "soft_targets=auto",
    "deepspeed.shards=teacher-zero3-offload", "placement.shards={level0: 2}", "placement.student_groups=2",
    "tracker=wandb", "teachers.forward_channels_last=true",
)
IDENTITY = (
    "seed=1", "data.name=cifar10", "data.seed=1", "data.validation=0.2", "data.test=0.2",
    "data.image_size=32", "data.image_column=i", "data.label_column=l", "data.label_separator=;", "views.crop=4",
    "views.resized_crop=[0.5, 1]", "views.flip=true", "views.affine=null", "views.affine.shear=1", "views.colour=0.1",
    "views.randaugment.magnitude=8", "pyramid.0.model.name=cnn", "pyramid.0.model.width=2", "pyramid.0.model.std=[1]",
    "pyramid.1.classes=[[0, 1]]", "pyramid.1.classes.1.0=6", "students.0.name=c", "students.1.model.name=cnn",
    "students.1.model.weights=w", "students.0.model.input_size=8", "students.0.model.mean=[0.1]", "students.0.lr=0.1",
    "students.0.optimizer=adamw", "students.1.momentum=0.5", "students.1.ema=0.9", "students.0.label_smoothing=0.1",
    "teachers.steps=10", "teachers.batch=8", "teachers.evaluate_every=1", "teachers.forward=bf16", "teachers.clip=1",
    "objective.kind=top", "objective.temperature=3", "objective.weights=[1, 1]", "objective.ensemble=[0, 1]",
    "objective.routes=all", "objective.denominator=batch",
    "distill.epochs=1", "distill.batch=8", "distill.sync_batch_norm=true", "distill.compile=true",
    "deepspeed.students=zero1-bf16", "deepspeed.students=zero1-autocast", "deepspeed.teachers=zero1-fp16",
)


@pytest.mark.parametrize("override", FREE)
def test_a_free_key_changes_the_recipe_and_not_its_identity(override):
    recipe, base = changed(override), parse_recipe(FULL)
    assert recipe != base and digest(identity(recipe)) == digest(identity(base))


def test_every_free_key_is_tried():
    tried = {tuple(override.split("=")[0].split(".")) for override in FREE}
    full, inner = parse_recipe(FULL), ("data", "teachers")
    free = {(key,) for key in Recipe.FREE} | {(name, key) for name in inner for key in type(getattr(full, name)).FREE}
    assert free == {path if path[0] in inner else path[:1] for path in tried}


@pytest.mark.parametrize("override", IDENTITY)
def test_any_other_key_changes_the_identity_and_the_difference_names_it(override):
    here, there = identity(changed(override)), identity(parse_recipe(FULL))
    assert digest(here) != digest(there)
    key = "dtypes" if override.startswith("deepspeed") else override.split("=")[0]
    assert difference(here, there).startswith(key)


def test_keys_left_out_and_keys_written_with_their_defaults_are_one_identity():
    assert digest(identity(parse_recipe(SMALL))) == digest(identity(parse_recipe(FULL)))
    assert difference(identity(parse_recipe(SMALL)), identity(parse_recipe(FULL))) == "nothing differs"


SHIPPED = sorted((Path(__file__).resolve().parent.parent / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_deepspeed_configuration_is_what_its_name_says(path):
    config = load_ds_config(path.stem)
    assert config == load_ds_config(str(path))
    name = path.stem.removeprefix("teacher-").removesuffix("-offload")
    kind = name.partition("-")[2] or "fp32"
    assert stage(config) == int(name[4])
    assert (precision(config), arithmetic(config)) == (("fp32", "bf16 autocast") if kind == "autocast" else (kind, kind))
    assert ("offload_param" in config["zero_optimization"]) == path.stem.endswith("-offload")


@pytest.mark.parametrize(("text", "words"), [
    ('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 0}}', ["fp16 with ZeRO 0"]),
    ('{"fp16": {"enabled": true}}', ["fp16 with ZeRO 0"]),
    ('{"gradient_clipping": 1.0}', ["gradient_clipping", "clip"]),
    ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}, "zero_optimization": {"stage": 1}}', ["bf16 and fp16"]),
    ('{"zero_optimization": {"stage": 4}}', ["stage", "found 4"]), ('{"zero_optimization": []}', ["zero_optimization"]),
    ('{"optimizer": {"type": "Adam"}}', ["sets optimizer"]), ('{"train_batch_size": 4}', ["sets train_batch_size"]),
    ('{"torch_autocast": {"enabled": true, "dtype": "float16"}}', ["torch_autocast", "'float16'", "bfloat16"]),
    ('{"bf16": {"enabled": true}, "torch_autocast": {"enabled": true}}', ["bf16 and torch_autocast"]),
    ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', ["reduce_bucket_size", "'auto'", "leave it out"]),
    ('{"zero_optimization": {"stage": 3, "sub_group_size": 0}}', ["sub_group_size", "above 0"]),
    ('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}',
     ["grad_accum_dtype", "remove it"]),
    ('{"bf16": true}', ["bf16 must be an object"]), ("[]", ["JSON object"]), ("{", ["read as JSON"]),
    ('{"steps_per_print": ' + "9" * 5000 + "}", ["read as JSON"]), ("[" * 200000, ["read as JSON"]),
], ids=lambda value: value[:40] if isinstance(value, str) else None)
def test_a_deepspeed_configuration_that_pkd_cannot_keep_is_refused(tmp_path, text, words):
    path = tmp_path / "own.json"
    path.write_text(text, encoding="utf-8")
    message = refusal(lambda: load_ds_config(str(path)))
    assert message is not None and all(word in message for word in words)


def test_parts_of_a_network_are_not_clipped_each_by_itself():
    config = {"zero_optimization": {"stage": 3, "sub_group_size": 1000}}
    for clipped, elements in ((False, 5000), (True, 1000)):
        check_clip(config, clipped, elements)
    assert "sub_group_size is 1000, fewer than the 5000" in refusal(lambda: check_clip(config, True, 5000))
    check_clip({"zero_optimization": {"stage": 3}}, True, 5000)
    assert engine_config({"zero_optimization": {"stage": 3}}, 2, 1, 3 * 10**9)["zero_optimization"]["sub_group_size"] == 3e9


def test_compiling_is_refused_where_there_is_no_compiler(monkeypatch):
    check_compiler(False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    message = refusal(lambda: check_compiler(True))
    assert "distill.compile is true" in message and "g++" in message


def test_a_deepspeed_configuration_that_is_not_there_names_the_nearest():
    assert "did you mean 'zero1'" in refusal(lambda: load_ds_config("zerro1"))


def test_auto_is_what_the_device_is_fastest_with_and_no_identity_depends_on_it():
    assert load_ds_config("auto", "cpu") == load_ds_config("zero0")
    assert load_ds_config("auto", "cuda") == load_ds_config("zero1")
    assert load_ds_config("auto") == load_ds_config("auto", "cuda" if torch.cuda.is_available() else "cpu")
    asked = [identity(changed(f"deepspeed={{students: {name}, teachers: {name}}}")) for name in ("auto", "zero0", "zero1")]
    assert asked[0] == asked[1] == asked[2]


def test_an_identity_is_plain_json():
    assert json.loads(json.dumps(identity(parse_recipe(FULL)), allow_nan=False)) == identity(parse_recipe(FULL))
