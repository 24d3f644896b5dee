"""The arms of a study: what each trains and asks, at what cost."""

from dataclasses import replace

import pytest

from pkd.cost import network_cost
from pkd.errors import UserError
from pkd.objective import asked, constants
from pkd.pyramid import build_pyramid
from pkd.recipe_file import load_recipe
from pkd.study.arms import answers, built_in, choose, own_arm, pyramid_flops, refuse_unequal, student_flops, teacher_flops
from pkd.study.teachers import folder_name, teacher_words

SHAPE, SAMPLES = (10, 1, (8, 8)), 1456
CLASSES = tuple("0123456789")
EQUAL = {"views", "data", "distill", "seed", "students"}


def arms(*changes: str):
    """Name -> arm, and name -> recipe, of the arms of digits with changes."""
    known, out = built_in(load_recipe("digits", changes), SHAPE, CLASSES, SAMPLES)
    recipes = {arm.name: load_recipe("digits", [*changes, *arm.changes]) for arm in known}
    return {arm.name: arm for arm in known}, recipes, out


def cost_of(recipe) -> float:
    pyramid = build_pyramid(recipe.pyramid, CLASSES, recipe.seed)
    teachers = [pyramid.teachers[index] for index in asked(recipe.objective.kind, pyramid)]
    return sum(teacher_flops(recipe, recipe.pyramid[t.level], len(t.classes), SHAPE, SAMPLES) for t in teachers)


@pytest.mark.parametrize("changes", [(), ("objective.kind=paper",), ("views.affine=null",),
                                     ("pyramid.1.partition=confusion", "students.0.lr=0.3")])
def test_students_views_and_data_are_equal_in_every_arm(changes):
    _, recipes, out = arms(*changes)
    base = load_recipe("digits", changes)
    assert len(recipes) == 11 and set(out) == {"peers-long"}, "two teachers for 1.5 tops are what peers has"
    for recipe in recipes.values():
        assert all(getattr(recipe, key) == getattr(base, key) for key in EQUAL)


def test_every_arm_asks_what_its_name_says():
    known, recipes, _ = arms()
    said = {name: constants(recipe, len(recipe.pyramid)) for name, recipe in recipes.items()}
    assert {name: own.kind for name, own in said.items()} == {
        "alone": "alone", "top": "top", "top-t20": "top", "top-ensemble": "top", "peers": "composed",
        "peers-ensemble": "composed", "top-long": "top", "long-ensemble": "top", "paper-plain": "paper", "paper": "paper",
        "composed": "composed"}
    assert (said["top"].temperature, said["top"].weights) == (4, (1,))
    assert (said["top-t20"].temperature, said["top-t20"].weights) == (20, (0.6,))
    assert said["paper-plain"].ensemble == (0, 0) and said["paper"].ensemble == (0.2, 0.8)
    assert said["top-ensemble"].ensemble == (0.2, 0.8), "what an ensemble loss gains is not the pyramid's"
    assert (said["top-ensemble"].temperature, said["top-ensemble"].weights) == (20, (0.6,))
    assert said["long-ensemble"] == said["top-ensemble"], "nor may it be for want of a control that costs as much"
    assert replace(said["peers-ensemble"], kind="top") == said["top-ensemble"], "or of one with several teachers"
    assert recipes["peers-ensemble"].pyramid == recipes["peers"].pyramid
    assert recipes["peers-ensemble"].teachers == recipes["peers"].teachers
    assert recipes["long-ensemble"].teachers.steps == recipes["top-long"].teachers.steps
    assert {name for name, arm in known.items() if arm.control} == {
        "alone", "top", "top-t20", "top-ensemble", "peers", "peers-ensemble", "top-long", "long-ensemble"}


@pytest.mark.parametrize(("changes", "count"), [
    ((), 2), (("pyramid.1.steps=2500",), 3), (("pyramid.0.steps=500", "pyramid.1.steps=400"), 2),
    (("pyramid.1.model=pkd_resnet_m", "pyramid.1.teachers=1"), 2),
    (("pyramid.1.model={name: pkd_resnet_s, width: 1.3}",), 2)])
def test_peers_cost_what_any_pyramid_costs(changes, count):
    """Also one of 1.5 times its top."""
    _, recipes, _ = arms(*changes)
    assert len(recipes["peers"].pyramid) == count
    assert cost_of(recipes["peers"]) == pytest.approx(cost_of(recipes["composed"]), rel=0.02)
    assert cost_of(recipes["top-long"]) == pytest.approx(cost_of(recipes["composed"]), rel=0.02)


def test_controls_cost_what_the_pyramid_costs():
    known, recipes, _ = arms("pyramid.0.model=pkd_resnet_s", "pyramid.1.teachers=4")
    whole = cost_of(recipes["composed"])
    assert len(recipes["peers"].pyramid) == 5 and recipes["top-long"].teachers.steps > 2900
    longest, every = recipes["top-long"].teachers.steps, recipes["composed"].teachers.steps
    assert longest > 6 * every, "a single teacher answers once, where the pyramid's five all answer: 5 without that"
    assert len(recipes["peers-long"].pyramid) == 2 and recipes["peers-long"].objective.kind == "composed"
    for name in ("peers", "peers-ensemble", "top-long", "long-ensemble", "peers-long"):
        assert known[name].control
        assert cost_of(recipes[name]) == pytest.approx(whole, rel=0.02)
    assert cost_of(recipes["alone"]) == 0 and cost_of(recipes["top"]) == pytest.approx(whole / 5, rel=0.02)


@pytest.mark.parametrize("views", [30, 60])
def test_controls_cost_the_same_whatever_objective_the_recipe_begins_with(views):
    """Else a recipe of the paper's, whose specialists answer less, would shut the composed objective out as too dear."""
    seen = f"views.finite={views}", f"distill.epochs={views}", "pyramid.0.steps=5000"
    plain = arms(*seen)
    for kind in ("paper", "top"):
        _, recipes, _ = arms(*seen, f"objective.kind={kind}")
        for name in ("peers", "top-long"):
            assert recipes[name].teachers.steps == plain[1][name].teachers.steps
    own = pyramid_flops(load_recipe("digits", [*seen, "objective.kind=paper"]), SHAPE, SAMPLES)[0]
    assert own == pytest.approx(cost_of(plain[1]["composed"])) and own > cost_of(plain[1]["paper"])


def test_costs_are_three_forwards_a_sample_of_every_step_and_one_for_every_answer():
    recipe = load_recipe("digits")
    one = network_cost(recipe.pyramid[0].model, *SHAPE).flops
    whole, top = pyramid_flops(recipe, SHAPE, SAMPLES)
    assert top == 3 * 64 * 600 * one + 30 * SAMPLES * one and whole > top
    paper = load_recipe("digits", ["objective.kind=paper"])
    half = network_cost(recipe.pyramid[1].model, 5, *SHAPE[1:]).flops
    assert teacher_flops(recipe, recipe.pyramid[1], 5, SHAPE, SAMPLES) == (3 * 64 * 600 + 30 * SAMPLES) * half
    assert teacher_flops(paper, recipe.pyramid[1], 5, SHAPE, SAMPLES) == (3 * 64 * 600 + 15 * SAMPLES) * half
    for views, seen in (("views={}", 1), ("views.finite=2", 2), ("views.finite=99", 30), ("views.finite=null", 30)):
        assert answers(load_recipe("digits", [views]), SAMPLES) == seen * SAMPLES
    per_image = sum(network_cost(student.model, *SHAPE).flops for student in recipe.students)
    assert student_flops(recipe, SHAPE, SAMPLES) == 3 * per_image * 30 * 64 * 22


def test_the_recipes_own_constants_are_those_of_its_kind():
    _, recipes, _ = arms("objective={kind: composed, temperature: 2}")
    assert recipes["composed"].objective.temperature == 2 and recipes["paper"].objective.temperature is None
    assert recipes["peers"].objective == recipes["composed"].objective, "or a gain of theirs would be the pyramid's"
    assert recipes["top-own"].objective.kind == "top" and recipes["top-own"].objective.temperature == 2
    assert recipes["top-long"].objective == recipes["top-own"].objective and recipes["top"].objective.temperature == 4
    assert "top-own" not in arms()[1] and "recipe" not in arms()[1]
    known, recipes, _ = arms("objective={kind: top, temperature: 2}")
    assert known["recipe"].changes == () and recipes["recipe"].objective.temperature == 2
    assert "recipe" not in arms("objective.kind=top")[1] and "recipe" in arms("objective={kind: alone, ensemble: [1, 1]}")[1]
    _, recipes, _ = arms("objective={kind: paper, weights: [0.1, 0.2], ensemble: [0.5, 0.5]}")
    assert recipes["paper"].objective.weights == (0.1, 0.2) == recipes["paper-plain"].objective.weights
    assert recipes["paper-plain"].objective.ensemble == (0, 0)


def test_a_control_has_the_recipes_own_constants_whichever_they_are():
    _, recipes, _ = arms("objective={kind: composed, temperature: 20, weights: [0.6]}")
    assert recipes["top-long"].objective.temperature == 20 == recipes["peers"].objective.temperature
    assert "top-own" not in recipes, "top-t20 is that"
    _, recipes, _ = arms("objective={kind: paper, temperature: 3, weights: [0.4, 0.9], ensemble: [0, 0.7]}")
    own = recipes["top-ensemble"].objective
    assert (own.temperature, own.weights, own.ensemble) == (3, (0.4,), (0, 0.7))
    assert recipes["top-long"].objective == own, "a longer teacher with the same constants"
    assert "top-own" not in recipes and "long-ensemble" not in recipes
    _, recipes, _ = arms("objective={kind: paper, ensemble: [0, 0]}")
    assert "top-ensemble" not in recipes and "top-own" not in recipes, "top-t20 is that"
    _, recipes, _ = arms("objective={kind: paper, temperature: 5, weights: [0.9, 1.0], ensemble: [0, 0]}")
    for name in ("top-own", "top-long"):
        own = recipes[name].objective
        assert (own.kind, own.temperature, own.weights, own.ensemble) == ("top", 5, (0.9,), (0, 0))


def test_peers_that_would_hardly_be_trained_are_no_control():
    _, recipes, out = arms("distill.epochs=300", "views.finite=300")
    assert "peers" not in recipes and "would be trained for 1 of its 600 steps" in out["peers"]
    assert recipes["top-long"].teachers.steps > 600


def test_a_specialist_is_not_asked_about_images_whose_label_nobody_knows():
    recipe = load_recipe("digits", ["objective.kind=paper"])
    top, half = (teacher_flops(recipe, level, count, SHAPE, SAMPLES, 300) for level, count in zip(recipe.pyramid, (10, 5)))
    assert top == teacher_flops(recipe, recipe.pyramid[0], 10, SHAPE, SAMPLES)
    one = network_cost(recipe.pyramid[1].model, 5, *SHAPE[1:]).flops
    assert half == pytest.approx((3 * 64 * 600 + 30 * 150) * one)
    dearest = pyramid_flops(recipe, SHAPE, SAMPLES)[0]
    assert dearest == pytest.approx(top + 2 * (3 * 64 * 600 + 30 * SAMPLES) * one), "what the composed objective would ask"


def test_arms_that_do_not_suit_the_pyramid_are_left_out_and_refused_when_asked_for():
    known, _, out = arms("pyramid=[{teachers: 1, model: pkd_resnet_s}, {classes: [[0, 1, 2], [2, 3]], model: pkd_resnet_s}, "
                         "{classes: [[0, 1], [2, 3]], model: pkd_resnet_s}]")
    assert set(out) == {"composed"} and "pyramid.1 overlaps" in out["composed"]
    with pytest.raises(UserError, match=r"composed was asked for, but pyramid\.1 overlaps"):
        choose(list(known.values()), out, [], ["composed"])
    _, _, out = arms("pyramid=[{teachers: 1, model: pkd_resnet_s}]")
    assert set(out) == {"peers", "peers-ensemble", "top-long", "long-ensemble", "peers-long"}
    assert "costs 1.00 times its top" in out["peers"]


def test_a_pyramid_that_cannot_be_built_is_refused_before_its_cost_is_asked_for():
    for level in ("{classes: [], model: pkd_resnet_s}", "{teachers: 6, model: pkd_resnet_s}"):
        with pytest.raises(UserError, match=r"pyramid\.1"):
            arms(f"pyramid=[{{teachers: 1, model: pkd_resnet_s}}, {level}]")


def test_arms_share_teachers_and_archives_where_these_are_the_same():
    def folders(*changes):
        known, _, _ = arms(*changes)
        out = {}
        for name, arm in known.items():
            words = ["digits", *changes, *arm.changes, "seed=3"]
            shared = teacher_words(load_recipe(words[0], words[1:]), words)
            out[name] = folder_name(load_recipe(shared[0], shared[1:]))
        return out
    online = folders("views.finite=null")
    assert online["paper"] == online["paper-plain"] == online["composed"] and online["top"] == online["top-t20"]
    assert len({online[name] for name in ("top", "top-long", "peers", "paper")}) == 4
    assert all(name.endswith("-seed-3") for name in online.values())
    archived = folders("views.finite=2")
    assert archived["paper"] == archived["paper-plain"] != archived["composed"], "who is asked about what differs"
    assert archived["top"] == archived["top-t20"]
    coarse = folders("views.finite=2", "archive.top_k=3")
    assert coarse["top"] != coarse["top-t20"], "what is kept of a row depends on the temperature"


def test_an_arm_of_ones_own_is_a_name_and_changes():
    arm = own_arm("soft=objective={kind: composed, temperature: 2}  teachers.steps=9")
    assert (arm.name, arm.changes) == ("soft", ("objective={kind: composed, temperature: 2}", "teachers.steps=9"))
    assert not arm.control
    for text, why in (("soft", "holds no changes"), ("soft=x", "holds no changes"), ("../up=seed=1", "file name")):
        with pytest.raises(UserError, match=why):
            own_arm(text)
    known, out = built_in(load_recipe("digits"), SHAPE, CLASSES, SAMPLES)
    with pytest.raises(UserError, match="already"):
        choose(known, out, [own_arm("top=seed=1")], None)
    with pytest.raises(UserError, match="did you mean 'paper'"):
        choose(known, out, [], ["papr"])
    assert [own.name for own in choose(known, out, [arm], ["top"])] == ["top", "soft"]


@pytest.mark.parametrize(("change", "key"), [("data.seed=1", "data"), ("seed=1", "seed"), ("distill.epochs=1", "distill"),
                                             ("views={}", "views"), ("students.0.model.width=2", "students"),
                                             ("students.0.lr=0.3", "students"),
                                             ("deepspeed.students=zero2-bf16", "deepspeed.students"),
                                             ("placement.accumulation=2", r"placement\.accumulation")])
def test_an_arm_may_not_change_what_students_are_and_see(change, key):
    arm = own_arm(f"mine={change}")
    with pytest.raises(UserError, match=f"arm mine changes {key}"):
        refuse_unequal(load_recipe("digits"), arm, load_recipe("digits", arm.changes))
