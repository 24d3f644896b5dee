"""study.json: what the results of a study say together; pure."""

import time

import numpy as np

from pkd.predictions import ENSEMBLE
from pkd.study.arms import LONGER
from pkd.study.results import right
from pkd.study.statistics import RESAMPLES, crossed_bootstrap, mean_sd

FIGURES = ("accuracy", "loss", "calibration_error", "validation_accuracy", "validation_loss")
YARDSTICK = "top"  # every arm is compared with it, and with the best control


def aggregate(name: str, results: list[dict], order: list[str], seeds: list[int], pyramid_flops: float,
              classes: int, readings: int) -> dict:
    """order: the study's arms, seeds: those that are asked for; seeds that all of these arms have count as asked for, too,
    and other arms that have results come after them. readings: of the test split, with those of results that are gone.

    The best control and the challenger, the best of the other arms, are chosen by _best() among arms whose teachers cost no
    more than the pyramid's. The difference between these two decides, unless _undecided() knows why not.
    """
    by_arm: dict[str, dict[int, dict]] = {arm: {} for arm in order}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    arms = {arm: _arm(own) for arm, own in by_arm.items() if own}
    shared = set.intersection(*(set(by_arm[arm]) for arm in order)) if order else set()
    seeds = sorted({*seeds, *shared})  # a choice among seeds would be one among verdicts
    most = LONGER * pyramid_flops
    fair = [arm for arm in arms if arms[arm]["teacher_flops"] <= most]
    (best, chosen_on, rivals), (challenger, _, others) = (
        _best({arm: by_arm[arm] for arm in fair if arms[arm]["control"] == control}, seeds) for control in (True, False))
    equal = any(arms[arm]["control"] and arms[arm]["teacher_flops"] * LONGER >= pyramid_flops
                and set(seeds) <= set(by_arm[arm]) for arm in fair)
    undecided = _undecided(by_arm, order, seeds, (best, challenger), rivals + others, equal)
    verdict = None if undecided else (challenger, best)
    differences = [difference for arm in arms for against in dict.fromkeys(a for a in (YARDSTICK, best) if a in arms)
                   if against != arm
                   for difference in _differences(by_arm, arm, against, (arm, against) == verdict)]
    return {
        "recipe": name, "written": time.time(), "classes": classes,
        **{key: results[0].get(key) if results else None for key in ("study", "fingerprint", "test_images")},
        "seeds": sorted({result["seed"] for result in results}), "asked": list(seeds),
        "test_readings": readings,
        "complete": all(seed in by_arm[arm] for arm in order for seed in seeds),
        "missing": [f"{arm}-seed-{seed}" for arm in order for seed in seeds if seed not in by_arm[arm]],
        "world_sizes": sorted({result["world_size"] for result in results}),
        "micro_batches": sorted({result["micro_batch"] for result in results}),
        "made_by": sorted({result["made_by"] for result in results}), "pyramid_flops": pyramid_flops,
        "arms": arms, "best_control": best, "chosen_on": chosen_on, "challenger": challenger, "undecided": undecided,
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
            out.append(f"nothing decides yet, for {arm}{why} lacks seeds that are asked for: run it with --seeds "
                       f"{','.join(map(str, lacks))},")
    return out


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


def _differences(by_arm: dict[str, dict[int, dict]], arm: str, against: str, decides: bool) -> list[dict]:
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
                    "seeds": len(seeds), "decides": decides and name == ENSEMBLE})
    return out
