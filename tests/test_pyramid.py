"""The pyramid: how classes are shared out, and which pyramids are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.errors import UserError
from pkd.pyramid import Pyramid, build_pyramid
from pkd.recipe import Level
from pkd.recipe_file import parse_recipe

quick = settings(max_examples=100, deadline=None)
ANIMALS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
TOP = {"teachers": 1}


def build(*levels: dict, classes: tuple[str, ...] = ANIMALS, seed: int = 0) -> Pyramid:
    """The pyramid of a recipe with these levels: what a level may not be, either of the two steps may refuse."""
    recipe = parse_recipe({"name": "r", "data": {"name": "digits"}, "students": [{"name": "s", "model": "m"}],
                           "pyramid": [{"model": "m", **level} for level in levels]})
    return build_pyramid(recipe.pyramid, classes, seed)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {c}" for c in range(count))


@st.composite
def counted(draw) -> tuple[int, list[dict]]:
    """(classes, levels): a top and levels that ask for counts of 2 teachers or more."""
    classes = draw(st.integers(4, 60))
    level = st.fixed_dictionaries({"teachers": st.integers(2, classes // 2),
                                   "partition": st.sampled_from(["contiguous", "random"])})
    return classes, [TOP, *draw(st.lists(level, max_size=3))]


@given(wish=counted(), seed=st.integers(0, 2**63 - 1))
@quick
def test_a_level_by_count_is_disjoint_complete_and_balanced_within_one(wish, seed):
    classes, levels = wish
    pyramid = build(*levels, classes=names(classes), seed=seed)
    assert pyramid.levels == len(levels)
    for number, level in enumerate(levels):
        groups = [teacher.classes for teacher in pyramid.level(number)]
        assert len(groups) == level["teachers"]
        assert sorted(c for group in groups for c in group) == list(range(classes))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        assert all(list(group) == sorted(group) for group in groups)
        assert pyramid.partitions(number)
        if level.get("partition") == "contiguous":
            assert [c for group in groups for c in group] == list(range(classes))


@given(wish=counted(), seed=st.integers(0, 2**63 - 1))
@quick
def test_the_pyramid_is_a_function_of_its_arguments(wish, seed):
    classes, levels = wish
    assert build(*levels, classes=names(classes), seed=seed) == build(*levels, classes=names(classes), seed=seed)


def test_a_random_partition_differs_between_seeds_and_between_levels():
    halves = {"teachers": 2, "partition": "random"}
    first, second = (build(TOP, halves, halves, classes=names(40), seed=seed) for seed in (1, 2))
    assert first.level(1)[0].classes != second.level(1)[0].classes
    assert first.level(1)[0].classes != first.level(2)[0].classes


def test_a_contiguous_partition_ignores_the_seed():
    assert build(TOP, {"teachers": 3}, seed=1) == build(TOP, {"teachers": 3}, seed=2)


@given(wish=counted())
@quick
def test_membership_says_who_knows_what(wish):
    classes, levels = wish
    pyramid = build(*levels, classes=names(classes))
    known = pyramid.membership()
    assert known.shape == (len(pyramid.teachers), classes)
    assert all(tuple(np.flatnonzero(row)) == teacher.classes for row, teacher in zip(known, pyramid.teachers))


@given(wish=counted())
@quick
def test_only_who_knows_every_class_is_asked_about_samples_without_a_label_where_others_are_asked_their_own(wish):
    classes, levels = wish
    pyramid = build(*levels, classes=names(classes))
    own, every = pyramid.asked_about(True), pyramid.asked_about(False)
    assert every.all() and every.shape == own.shape == (len(pyramid.teachers), classes + 1)
    assert np.array_equal(own[:, :-1], pyramid.membership())
    assert own[:, -1].tolist() == [len(teacher.classes) == classes for teacher in pyramid.teachers]


def test_teachers_are_named_by_level_and_index_from_the_top_down():
    pyramid = build(TOP, {"teachers": 2}, {"teachers": 4})
    assert [teacher.name for teacher in pyramid.teachers] == [
        "level0", "level1-0", "level1-1", "level2-0", "level2-1", "level2-2", "level2-3"]
    assert [teacher.level for teacher in pyramid.teachers] == [0, 1, 1, 2, 2, 2, 2]


def test_class_lists_take_names_and_ids_and_are_kept_in_ascending_order():
    pyramid = build(TOP, {"classes": [["dog", "ant"], [2, "bee"]]})
    assert [teacher.classes for teacher in pyramid.level(1)] == [(0, 3), (1, 2)]


def test_a_middle_level_may_overlap_and_the_bottom_one_may_leave_classes_out():
    pyramid = build(TOP, {"classes": [[0, 1, 2], [1, 2, 3]]}, {"classes": [[1, 2]]})
    assert not pyramid.partitions(1) and not pyramid.partitions(2)


@given(peers=st.lists(st.sampled_from([TOP, {"classes": [list(ANIMALS)]}, {"classes": [list(range(8))]},
                                       {"teachers": 1, "partition": "random"}, {"teachers": 2}]), max_size=4))
@quick
def test_a_lower_level_may_be_one_teacher_that_knows_every_class_like_the_top(peers):
    pyramid = build(TOP, *peers)
    assert pyramid.levels == 1 + len(peers) and all(map(pyramid.partitions, range(pyramid.levels)))
    for number, level in enumerate(peers, 1):
        if level != {"teachers": 2}:
            peer, = pyramid.level(number)
            assert (peer.name, peer.classes) == (f"level{number}", tuple(range(8)))


@given(order=st.permutations(range(8)))
@quick
def test_the_top_may_be_a_list_in_any_order(order):
    assert build({"classes": [list(order)]}).teachers[0].classes == tuple(range(8))


def test_an_id_that_is_another_classs_name_is_refused_and_a_name_in_quotes_is_taken():
    """Folders 0 to 11 are sorted as text: 10 has the id 2."""
    folders, top = tuple(sorted(map(str, range(12)))), Level(model={"name": "pkd_mobile"}, teachers=1)
    level = Level(model={"name": "pkd_mobile"}, classes=[[0, 1, "2"]])
    assert build_pyramid((top, level), folders, 0).teachers[1].classes == (0, 1, 4)
    with pytest.raises(UserError, match=r"holds the id 2, but a class is named 2, too, and has the id 4"):
        build_pyramid((top, Level(model={"name": "pkd_mobile"}, classes=[[0, 1, 2]])), folders, 0)


REFUSED = {
    "the top lacks a class": [{"classes": [list(range(7))]}],
    "two top teachers": [{"teachers": 2}],
    "two top lists, each complete": [{"classes": [list(range(8)), list(range(8))]}],
    "no top teacher": [{"classes": []}],
    "no teacher in the middle": [TOP, {"classes": []}, {"teachers": 2}],
    "no teacher on the bottom level": [TOP, {"classes": []}],
    "an empty class list": [TOP, {"classes": [[], [0, 1]]}],
    "an unknown class name": [TOP, {"classes": [["ant", "beee"]]}],
    "a class name with a line break": [TOP, {"classes": [["ant", "be\ne"]]}],
    "an id too high": [TOP, {"classes": [[0, 8]]}],
    "a negative id": [TOP, {"classes": [[0, -1]]}],
    "an id of thousands of digits": [TOP, {"classes": [[0, 10**5000]]}],
    "an overlapping bottom": [TOP, {"classes": [[0, 1], [1, 2]]}],
    "two lower teachers that know every class": [TOP, {"classes": [list(range(8))] * 2}, {"teachers": 2}],
    "a teacher whose classes no single teacher above knows more than": [
        {"classes": [list(range(8))]}, {"classes": [list(range(8)), [0, 1]]}],
    "too many teachers": [TOP, {"teachers": 5}],
    "teachers of thousands of digits": [TOP, {"teachers": 10**5000}],
    "a list of a single class": [TOP, {"classes": [[0], [1, 2]]}],
    "a class twice in a list": [TOP, {"classes": [[0, 1, 0]]}],
    "a class twice, by id and by name": [TOP, {"classes": [[0, "ant", 1]]}],
}


@pytest.mark.parametrize("levels", REFUSED.values(), ids=REFUSED)
def test_a_pyramid_that_cannot_be_is_refused_in_one_line(levels):
    with pytest.raises(UserError) as refusal:
        build(*levels)
    assert str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(("levels", "words"), [
    ([{"classes": [list(range(7))]}], ["pyramid.0", "1 of the 8 classes"]),
    ([{"teachers": 2}], ["pyramid.0", "2 teacher"]),
    ([TOP, {"classes": [["ant", "beee"]]}], ["pyramid.1.classes", "'beee'", "did you mean 'bee'"]),
    ([TOP, {"classes": [[0, 8]]}], ["pyramid.1.classes", "class 8", "0 to 7"]),
    ([TOP, {"classes": [[0, 1], [1, 2]]}], ["pyramid.1", "'bee'", "2 teachers"]),
    ([TOP, {"teachers": 5}], ["pyramid.1", "5 teachers over 8 classes", "at most 4"]),
    ([TOP, {"classes": [[0], [1, 2]]}], ["pyramid.1.classes", "[0]", "at least 2"]),
    ([TOP, {"classes": [[0, 1, 0]]}], ["pyramid.1.classes", "[0, 1, 0]", "once"]),
    ([TOP, {"classes": [[True, False]]}], ["classes"]),
])
def test_a_refusal_says_where_what_and_the_numbers(levels, words):
    with pytest.raises(UserError) as refusal:
        build(*levels)
    assert all(word in str(refusal.value) for word in words)
