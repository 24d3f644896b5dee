"""study.json: what the results of a study say together; pure."""

import time

import numpy as np

from pkd.objective import constants
from pkd.predictions import ENSEMBLE
from pkd.study.arms import LONGER
from pkd.study.results import right, stored_recipe
from pkd.study.statistics import RESAMPLES, crossed_bootstrap, mean_sd

FIGURES = ("accuracy", "loss", "calibration_error", "validation_accuracy", "validation_loss")
YARDSTICK = "top"  # every arm is compared with it, and with the best control
FEWEST = 6  # images that two arms must differ on to be told apart: of five, all for one arm, a sign test is not sure


def aggregate(name: str, results: list[dict], order: list[str], seeds: list[int], pyramid_flops: float,
              classes: int, readings: int, controls: list[str]) -> dict:
    """order: the study's arms, seeds: those that are asked for; seeds that all of these arms have count as asked for, too,
    and other arms that have results come after them. readings: of the test split, with those of results that are gone.
    controls: those that suit the recipe, whether or not this study has them.

    The best control and the challenger, the best of the other arms, are chosen by _best() among arms whose teachers cost no
    more than the pyramid's. The difference between these two decides, unless _undecided(), _unlike() or _few() know why not.
    """
    by_arm: dict[str, dict[int, dict]] = {arm: {} for arm in order}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    arms = {arm: _arm(own) for arm, own in by_arm.items() if own}
    shared = set.intersection(*(set(by_arm[arm]) for arm in order)) if order else set()
    seeds = sorted({*seeds, *shared})  # a choice among seeds would be one among verdicts
    most = LONGER * pyramid_flops
    fair = [arm for arm in arms if arms[arm]["teacher_flops"] <= most]
    judged, more = list(seeds), None
    while judged != more:  # those that the two have in common decide: then they must have been chosen on these, too
        judged = more or judged
        (best, chosen_on, rivals), (challenger, _, others) = (
            _best({arm: by_arm[arm] for arm in fair if arms[arm]["control"] == kind}, judged) for kind in (True, False))
        more = sorted({*judged, *(set(by_arm[best]) & set(by_arm[challenger]) if best and challenger else ())})
    whole = [arm for arm in fair if arms[arm]["control"] and set(judged) <= set(by_arm[arm])]
    equal = [arm for arm in whole if arms[arm]["teacher_flops"] * LONGER >= pyramid_flops]
    differences = [difference for arm in arms for against in dict.fromkeys(a for a in (YARDSTICK, best) if a in arms)
                   if against != arm for difference in _differences(by_arm, arm, against)]
    verdict = next((one for one in differences
                    if (one["arm"], one["against"], one["network"]) == (challenger, best, ENSEMBLE)), None)
    undecided = _undecided(by_arm, order, judged, (best, challenger), rivals + others, bool(equal)) \
        + _unlike(by_arm, challenger, equal) + _few(by_arm, verdict)
    if verdict:
        verdict["decides"] = not undecided
    return {
        "recipe": name, "written": time.time(), "classes": classes,
        **{key: results[0].get(key) if results else None for key in ("study", "fingerprint", "test_images")},
        "arms_asked": list(order), "seeds": sorted({result["seed"] for result in results}), "asked": list(seeds),
        "test_readings": readings,
        "complete": all(seed in by_arm[arm] for arm in order for seed in seeds),
        "missing": [f"{arm}-seed-{seed}" for arm in order for seed in seeds if seed not in by_arm[arm]],
        "world_sizes": sorted({result["world_size"] for result in results}),
        "micro_batches": sorted({result["micro_batch"] for result in results}),
        "made_by": sorted({result["made_by"] for result in results}), "pyramid_flops": pyramid_flops,
        "arms": arms, "best_control": best, "chosen_on": chosen_on, "challenger": challenger, "undecided": undecided,
        "not_run": [arm for arm in controls if arm not in arms],
        "dearer": [arm for arm in arms if arms[arm]["teacher_flops"] > most], "differences": differences}


def _undecided(by_arm: dict[str, dict[int, dict]], order: list[str], seeds: list[int], two: tuple[str | None, str | None],
               rivals: list[str], equal: bool) -> list[str]:
    """Why the difference between the best control and the challenger decides nothing yet, a sentence each."""
    out, (best, challenger) = [], two
    waiting = [arm for arm in order if not by_arm[arm]]
    if waiting:
        out.append(f"nothing decides yet, for {', '.join(waiting)} may be better and have no seed: wait for them, or leave "
                   "them out by --arms")
    if not (best and challenger):
        return out
    if not equal:
        out.append("nothing decides, for no control that has all seeds asked for had the compute of the pyramid: take peers "
                   "or top-long into the study")
    sizes = {result["micro_batch"] for arm in two for result in by_arm[arm].values()}
    if len(sizes) > 1:
        out.append(f"nothing decides, for students of {challenger} and {best} saw {' or '.join(map(str, sorted(sizes)))} "
                   "samples at once: run those of one size again on as many ranks as the others")
    if len(by_arm[challenger]) < 2:
        out.append(f"nothing decides yet, for {challenger}, the best of the arms that are no controls, has a single seed: "
                   "run it and the best control with more --seeds")
    for arm in (best, challenger, *rivals):
        lacks = sorted({*seeds, *by_arm[challenger]} - set(by_arm[arm]))
        if lacks:
            why = ", better on the seeds that it has," * (arm in rivals)
            out.append(f"nothing decides yet, for {arm}{why} lacks seeds that are compared: run it with --seeds "
                       f"{','.join(map(str, lacks))},")
    return out


def _unlike(by_arm: dict[str, dict[int, dict]], challenger: str | None, controls: list[str]) -> list[str]:
    """Why the challenger's gain may be that of its teachers' settings or of its constants: no control of the pyramid's
    compute with all seeds (controls) has them.
    """
    mine = _settings(by_arm[challenger]) if challenger else None
    if not controls or not challenger or (mine and any(_settings(by_arm[arm]) == mine for arm in controls)):
        return []
    return ["nothing decides, for no control with all seeds and the compute of the pyramid has the temperature, first "
            f"weight, ensemble loss, top model and teachers' settings of {challenger}: add one by --arm, or set in the "
            "recipe what this arm changes, which gives controls the same"]


def _settings(own: dict[int, dict]) -> tuple | None:
    """What an arm could owe a gain to that is not its pyramid; steps are what costs are made equal by."""
    recipe = stored_recipe(next(iter(own.values())))
    if recipe is None:
        return None
    its = constants(recipe, len(recipe.pyramid))
    settings = recipe.teachers.model_copy(update={"steps": 1})
    return its.temperature, its.weights[:1], its.ensemble, recipe.pyramid[0].model, settings


def _few(by_arm: dict[str, dict[int, dict]], one: dict | None) -> list[str]:
    """Of an interval without 0 that rests on images so few that drawing them anew says too little."""
    if one is None or one["interval"][0] <= 0 <= one["interval"][1]:
        return []
    arm, against = by_arm[one["arm"]], by_arm[one["against"]]
    gap = sum(right(arm[seed], ENSEMBLE).astype(int) - right(against[seed], ENSEMBLE) for seed in set(arm) & set(against))
    count = int(np.count_nonzero(gap))
    return [f"nothing decides, for {one['arm']} and {one['against']}, over all seeds together, differ on {count} test "
            f"images only, and chance could have it so with fewer than {FEWEST}: take a larger test split"
            ] * (count < FEWEST)


def _arm(own: dict[int, dict]) -> dict:
    """own: seed -> result."""
    results = [own[seed] for seed in sorted(own)]
    networks = {name: {**{key: list(mean_sd([result["networks"][name][key] for result in results])) for key in FIGURES},
                       "parameters": facts["parameters"]} for name, facts in results[0]["networks"].items()}
    teachers: dict[str, list[float]] = {}
    for result in results:
        for name, teacher in result["teachers"].items():
            if teacher["accuracy"] is not None:
                teachers.setdefault(name, []).append(teacher["accuracy"])
    first = results[0]
    return {"title": first["title"], "changes": first["changes"], "control": first["control"], "seeds": sorted(own),
            "networks": networks, "teacher_flops": mean_sd([result["teacher_flops"] for result in results])[0],
            "student_flops": first["student_flops"],
            "teachers": {name: mean_sd(values)[0] for name, values in teachers.items()}}


def _best(arms: dict[str, dict[int, dict]], asked: list[int]) -> tuple[str | None, list[int], list[str]]:
    """The arm of the highest mean validation accuracy of its ensemble, of equal ones that of the lowest validation loss; the
    seeds by which it was chosen; arms that lack seeds, but were better on those that they have.

    Only arms with all seeds that are asked for are chosen from, unless there is none; then from all, on the seeds that all
    of them have, and without one on those that each has.
    """
    def validated(arm: str, seeds: set[int]) -> tuple[float, float]:
        figures = [arms[arm][seed]["networks"][ENSEMBLE] for seed in sorted(seeds or arms[arm])]
        return (float(np.mean([own["validation_accuracy"] for own in figures])),
                -float(np.mean([own["validation_loss"] for own in figures])))
    whole = {arm: own for arm, own in arms.items() if set(asked) <= set(own)}
    of = whole or arms
    shared = set(asked) if whole else set.intersection(*map(set, of.values())) if of else set()
    best = max(of, default=None, key=lambda arm: validated(arm, shared))
    rivals = [arm for arm in arms if arm not in of
              and (both := set(arms[arm]) & set(arms[best])) and validated(arm, both) > validated(best, both)]
    return best, sorted(shared), rivals


def _differences(by_arm: dict[str, dict[int, dict]], arm: str, against: str) -> list[dict]:
    """Of every network that both arms have, over the seeds that both have finished."""
    seeds = sorted(set(by_arm[arm]) & set(by_arm[against]))
    if not seeds:
        return []
    names = [name for name in by_arm[arm][seeds[0]]["networks"] if name in by_arm[against][seeds[0]]["networks"]]
    out = []
    for name in names:
        one, other = (np.stack([right(by_arm[which][seed], name) for seed in seeds]) for which in (arm, against))
        # Ends of an ensemble's interval, which may decide, are to be sure to about a hundredth of its width.
        difference, low, high = crossed_bootstrap(one, other, RESAMPLES * (10 if name == ENSEMBLE else 1))
        out.append({"arm": arm, "against": against, "network": name, "difference": difference, "interval": [low, high],
                    "seeds": len(seeds), "decides": False})
    return out
