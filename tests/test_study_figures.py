"""study.json: what results that nobody ran say together; which control is best, what decides and what does not."""

import numpy as np
import pytest
from made_up import figures_of, made_up

from pkd.recipe_file import identity, load_recipe
from pkd.study.results import packed
from pkd.study.table import arms_table, differences_table, networks_table, remarks


def test_the_best_control_is_chosen_by_validation():
    arms = {"alone": (0.99, 0.75, True, 0), "top": (0.9, 0.7, True, 1), "peers": (0.6, 0.8, True, 2),
            "composed": (0.95, 0.95, False, 2)}
    found = figures_of([made_up(arm, seed, *own) for arm, own in arms.items() for seed in (0, 1)], list(arms))
    assert found["best_control"] == "peers" and found["complete"] and found["missing"] == []
    deciding = [one for one in found["differences"] if one["decides"]]
    assert [(one["arm"], one["against"], one["network"]) for one in deciding] == [("composed", "peers", "ensemble")]
    assert found["challenger"] == "composed"
    against = {(one["arm"], one["against"]) for one in found["differences"]}
    assert against == {(arm, other) for arm in arms for other in ("top", "peers") if arm != other}
    mean, sd = found["arms"]["composed"]["networks"]["ensemble"]["accuracy"]
    assert mean == pytest.approx(0.95, abs=0.03) and sd > 0
    gap = next(one for one in deciding if one["arm"] == "composed")
    assert gap["interval"][0] > 0.15 and gap["interval"][0] <= gap["difference"] <= gap["interval"][1] and gap["seeds"] == 2
    assert found["test_readings"] == 8 and found["arms"]["composed"]["teachers"] == {"level0": 0.95}


def test_of_equal_controls_the_one_with_the_lower_validation_loss_is_best():
    results = [made_up(arm, seed, 0.9, 0.9, True, 1, loss) for seed in (0, 1)
               for arm, loss in (("alone", 0.3), ("top", 0.2))]
    found = figures_of(results, ["alone", "top"])
    assert found["best_control"] == "top" and any("by validation on seeds 0, 1: top" in text for text in remarks(found))


def test_an_arm_whose_teachers_cost_more_than_the_pyramid_decides_nothing():
    results = [made_up("top", seed, 0.8, 0.8, True) for seed in (0, 1)]
    results += [made_up(arm, seed, 0.9, accuracy, False, cost) for arm, accuracy, cost in (
        ("composed", 0.85, 2.0), ("dear", 0.95, 2.2)) for seed in (0, 1)]
    found = figures_of(results, ["top", "composed", "dear"])
    assert found["challenger"] == "composed" and found["dearer"] == ["dear"]
    assert any("teachers of dear cost more than the pyramid" in text for text in remarks(found))
    found = figures_of([*results, *(made_up("long", seed, 0.9, 0.9, True, 2.2) for seed in (0, 1))], ["top", "composed"])
    assert found["best_control"] == "top" and found["dearer"] == ["dear", "long"], "nor does a control"


def test_an_unfinished_study_compares_the_seeds_that_both_arms_have():
    results = [made_up("top", 0, 0.8, 0.8, True), made_up("peers", 0, 0.8, 0.9, True), made_up("top", 1, 0.8, 0.8, True)]
    found = figures_of(results, ["top", "peers", "composed"])
    assert not found["complete"] and found["missing"] == ["peers-seed-1", "composed-seed-0", "composed-seed-1"]
    assert found["best_control"] == "top" and found["chosen_on"] == [0, 1], "peers may be better, but has one seed of two"
    assert [(one["arm"], one["against"], one["seeds"], one["difference"]) for one in found["differences"]] == [
        ("peers", "top", 1, 0)] * 2
    assert found["arms"]["peers"]["networks"]["mobile"]["accuracy"][1] is None
    said = "\n".join(remarks(found))
    assert "single seed" in said and "composed-seed-1" in said and "read 3 times" in said
    assert arms_table(found).row_count == 2 and differences_table(found).row_count == 1
    assert networks_table(found).row_count == sum(len(own["networks"]) for own in found["arms"].values()) == 4


@pytest.mark.parametrize("arm", ["peers", "paper"])
def test_an_arm_that_was_screened_only_blocks_the_verdict_if_it_was_better_and_is_left_behind_if_not(arm):
    """Screened with one seed, confirmed with three: no choice rests on a single seed."""
    control, arms = arm == "peers", ["top", "top-long", "composed"]
    confirmed = [made_up("top", seed, 0.8, 0.8, True) for seed in range(3)]
    confirmed += [made_up("top-long", seed, 0.8, 0.79 + 0.02 * (seed == 0), True, 2.0) for seed in range(3)]
    confirmed += [made_up("composed", seed, 0.95, 0.85, cost=2.0) for seed in range(3)]
    found = figures_of([*confirmed, made_up(arm, 0, 0.9, 0.9, control, 2.0)], arms, (0, 1, 2))
    assert (found["best_control"], found["challenger"], found["chosen_on"]) == ("top", "composed", [0, 1, 2])
    assert not any(one["decides"] for one in found["differences"])
    assert any(f"{arm}, better on the seeds that it has, lacks seeds" in text and "--seeds 1,2," in text
               for text in remarks(found))
    for many in (1, 3):
        more = [made_up(arm, seed, 0.9, 0.7, control, 2.0) for seed in range(many)]
        found = figures_of([*confirmed, *more], arms, (0, 1, 2))
        assert [(one["arm"], one["against"]) for one in found["differences"] if one["decides"]] == [("composed", "top")]
    assert not any("single seed" in text for text in remarks(found))


def test_a_control_of_the_pyramids_compute_must_have_all_seeds_too():
    results = [made_up("top", seed, 0.8, 0.8, True) for seed in range(3)]
    results += [made_up("composed", seed, 0.95, 0.95) for seed in range(3)] + [made_up("peers", 0, 0.7, 0.7, True, 2.0)]
    found = figures_of(results, ["top", "composed"], (0, 1, 2))
    assert not any(one["decides"] for one in found["differences"])
    assert any("no control that has all seeds asked for had the compute" in text for text in remarks(found))


@pytest.mark.parametrize("arms, seeds, reason", [
    ({"peers": 2.0}, 2, None),
    ({"peers": 2.0, "top-long": None}, 2, "top-long may be better and have no seed"),
    ({"top": 1.0}, 2, "had the compute of the pyramid"),
    ({"peers": 2.0}, 1, "composed, the best of the arms that are no controls, has a single seed"),
    ({"peers": 2.0}, 1, "composed lacks seeds that are compared: run it with --seeds 1,"),
])
def test_nothing_decides_before_there_is_nothing_left_to_choose_from(arms, seeds, reason):
    """arms: the controls' cost, None for one that has no result."""
    results = [made_up(arm, seed, 0.8, 0.8, True, cost) for arm, cost in arms.items() if cost for seed in range(seeds)]
    results += [made_up("composed", seed, 0.95, 0.95, False, 2.0) for seed in range(seeds)]
    found = figures_of(results, [*arms, "composed"])
    assert [(one["arm"], one["network"]) for one in found["differences"] if one["decides"]] == (
        [] if reason else [("composed", "ensemble")])
    assert reason is None or any(reason in text for text in remarks(found))


def test_nothing_finished_yet_is_no_error():
    found = figures_of([], ["top"])
    assert found["best_control"] is None and found["arms"] == {} and not found["complete"]


def test_a_choice_among_seeds_is_no_choice_among_verdicts():
    """Seeds that all arms have count, whether a call names them or not."""
    results = [made_up("top", seed, 0.8, 0.8, True, 2.0) for seed in range(3)]
    results += [made_up("composed", seed, 0.9, 0.9, False, 2.0) for seed in range(3)]
    assert figures_of(results, ["top", "composed"], (0, 1)) | {"written": 0} == \
        figures_of(results, ["top", "composed"], (0, 1, 2)) | {"written": 0}


def test_nor_is_a_choice_of_seeds_when_an_arm_lacks_some():
    """What decides rests on all seeds that the two arms have, and so does their choice."""
    results = [made_up("top", seed, 0.8, 0.8, True, 2.0) for seed in range(3)]
    results += [made_up("composed", seed, 0.9, 0.9, False, 2.0) for seed in range(3)]
    late = made_up("paper", 0, 0.95, 0.95, False, 2.0)
    for wanted in ((0,), (0, 1), (0, 1, 2)):
        found = figures_of([*results, late], ["top", "composed", "paper"], wanted)
        assert found["challenger"] == ("paper" if wanted == (0,) else "composed")
        assert not any(one["decides"] for one in found["differences"]), found["undecided"]
    late = made_up("paper", 0, 0.7, 0.7, False, 2.0)
    for wanted in ((0,), (0, 1), (0, 1, 2)):
        found = figures_of([*results, late], ["top", "composed", "paper"], wanted)
        assert [(one["arm"], one["seeds"]) for one in found["differences"] if one["decides"]] == [("composed", 3)]


def test_an_arm_decides_only_if_a_control_has_its_teachers_settings_and_constants():
    """Else a better rate or temperature would be taken for a gain of the pyramid."""
    def results(arm, accuracy, control, cost=2.0, **changes):
        recipe = identity(load_recipe("digits", [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]))
        return [made_up(arm, seed, accuracy, accuracy, control, cost) | {"recipe": recipe} for seed in range(3)]

    def undecided(*others):
        every = [*results("top", 0.8, True, objective__kind="top"), *(one for other in others for one in other)]
        found = figures_of(every, list(dict.fromkeys(one["arm"] for one in every)), (0, 1, 2))
        assert found["challenger"] in ("composed", "tuned")
        return found["undecided"]
    assert not undecided(results("composed", 0.9, False))
    for changes in ({"teachers__lr": 0.02}, {"objective__temperature": 2}, {"objective__ensemble": "[1, 1]"},
                    {"teachers__ema": 0.9}, {"pyramid__0__model": "pkd_resnet_l"}):
        tuned = results("tuned", 0.95, False, **changes)
        assert ["of tuned: add one by --arm" in text for text in undecided(results("composed", 0.9, False), tuned)] == [True]
        like = {"teachers__steps": 999, "objective__kind": "top", **changes}
        assert not undecided(tuned, results("long", 0.8, True, **like))
        assert undecided(tuned, results("short", 0.8, True, 1.0, **like)), "that has not the compute"
    for unreadable in ({"recipe": None}, {"recipe": {"gone": 1}}):
        assert undecided([one | unreadable for one in results("composed", 0.9, False)])


def test_arms_that_differ_on_a_handful_of_images_are_not_told_apart():
    def pair(images):
        out = [made_up(arm, seed, 1.0, 0.9, arm == "top", 2.0) for arm in ("top", "composed") for seed in range(3)]
        for result in out:
            right = np.arange(result["test_images"]) >= (images if result["arm"] == "top" else 0)
            result["correct"]["ensemble"] = packed(right)
        return figures_of(out, ["top", "composed"], (0, 1, 2))
    few, enough = pair(5), pair(6)
    for found in (few, enough):
        gap = next(one for one in found["differences"] if one["network"] == "ensemble")
        assert gap["interval"][0] > 0, "in every seed the same images"
    assert ["differ on 5 test images only" in text for text in few["undecided"]] == [True]
    assert not enough["undecided"] and any(one["decides"] for one in enough["differences"])


def test_controls_that_were_not_run_are_told():
    results = [made_up(arm, seed, 0.8, 0.8, arm == "top", 2.0) for arm in ("top", "composed") for seed in (0, 1)]
    found = figures_of(results, ["top", "composed"], controls=("alone", "top", "peers"))
    assert found["not_run"] == ["alone", "peers"]
    assert any("controls that were not run: alone, peers" in text for text in remarks(found))


def test_students_of_other_batches_decide_nothing_and_results_of_other_versions_are_told():
    results = [made_up(arm, seed, accuracy, accuracy, control, 2.0) for seed in range(3)
               for arm, accuracy, control in (("top", 0.8, True), ("composed", 0.9, False))]
    assert not any("on several ranks" in text for text in remarks(figures_of(results, ["top", "composed"], (0, 1, 2))))
    results[0] |= {"micro_batch": 16, "made_by": "another pkd", "world_size": 2}
    found = figures_of(results, ["top", "composed"], (0, 1, 2))
    assert not any(one["decides"] for one in found["differences"])
    said = " ".join(remarks(found))
    assert "saw 16 or 32 samples at once" in said and "results are of another pkd and of pkd" in said
    assert "a top teacher may have been trained on several ranks" in said
