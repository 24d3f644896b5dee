"""A study as a page: its verdict in words, its table, the differences, and what compute buys. Reads study.json alone."""

import json
import time
from functools import partial
from pathlib import Path

from pkd.errors import UserError
from pkd.files import read_json
from pkd.report.page import Page, Section, Table
from pkd.report.study_facts import ENSEMBLE, Study, has_interval, interval, points, spread
from pkd.report.study_plots import compute, forest
from pkd.report.style import Plot, counted, percent, short
from pkd.study.table import caveats


def page_of(path: Path) -> Page:
    """Raises UserError where study.json is damaged."""
    study = Study(read_json(path / "study.json"))
    try:
        return _page(study)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path / 'study.json'} does not describe a study ({type(error).__name__}: {error}): run pkd study "
                        "again, which writes it anew") from None


def _page(study: Study) -> Page:
    tree = study.tree
    subtitle = (f"{tree['classes']} classes · {counted(len(study.arms), 'arm')} · "
                f"{counted(len(tree['seeds']), 'seed')} · "
                + f"{tree['test_images']} test images, read {tree['test_readings']} times in all · " * bool(study.arms)
                + time.strftime("%Y-%m-%d %H:%M", time.localtime(tree["written"])))
    sections = [_verdict(study)]
    if study.arms:
        sections += [_table(study), _differences(study), _compute(study), _readings(study)]
    changes = {name: arm["changes"] for name, arm in study.arms.items()}
    return Page(f"Study {tree['recipe']}", subtitle, _cards(study), _notes(study), [s for s in sections if s],
                json.dumps(changes, indent=2, ensure_ascii=False))


def _notes(study: Study) -> list[str]:
    tree, notes = study.tree, []
    if not tree["complete"]:
        some = ", ".join(tree["missing"][:8]) + f" and {len(tree['missing']) - 8} more" * (len(tree["missing"]) > 8)
        notes.append(f"The study is not complete ({counted(study.runs, 'run')} done); not finished: {some}.")
    return notes + [text[0].upper() + text[1:] + "." for text in caveats(tree)]


def _cards(study: Study) -> list[tuple[str, str]]:
    cards, asked = [], set(study.tree["asked"])
    measured = {name: arm for name, arm in study.measured.items()
                if asked <= set(arm["seeds"]) and name not in study.tree["dearer"]}
    if measured and study.tree["complete"]:  # else over different seeds
        best = max(measured, key=lambda name: (measured[name]["networks"][ENSEMBLE]["validation_accuracy"][0],
                                               -measured[name]["networks"][ENSEMBLE]["validation_loss"][0]))
        if best != study.control:
            cards.append((percent(study.accuracy(best)), f"ensemble of the arm that is best by validation: {best}"))
    if study.control in study.measured:
        cards.append((percent(study.accuracy(study.control)),
                      f"best control, chosen by validation: {study.control}"))
    for one in study.judged:
        if one["decides"]:
            cards.append((f"{points(one['difference'])} points",
                          f"{one['arm']} against the best control, 95 % interval {interval(one)}"))
    return cards


def _verdict(study: Study) -> Section:
    if not study.control:
        return Section("Verdict", ["There is no best control yet: no control has a finished seed."])
    text = [f"The best control, chosen by validation accuracy of the ensemble, is \"{study.control}\"."]
    if any(one["decides"] for one in study.judged):
        text.append("One comparison decides, that of the other arm with the best validation accuracy; it comes first.")
    level = [one for one in study.judged if not one["decides"] and has_interval(one) and _includes_zero(one)]
    text += [_decision(study, one) for one in study.judged if one not in level]
    if level:
        names = ", ".join(f'"{one["arm"]}"' for one in level)
        text.append(f"These cannot be told apart from it, for their intervals include 0: {names}.")
    return Section("Verdict", text if study.judged else [*text, "Nothing has been compared with it yet."])


def _includes_zero(one: dict) -> bool:
    low, high = one["interval"]
    return low <= 0 <= high


def _decision(study: Study, one: dict) -> str:
    """One deciding difference as a sentence."""
    arm, gap = f'"{one["arm"]}"', points(one["difference"])
    if not has_interval(one):
        return f"{arm} differs by {gap} points, without an interval yet."
    said, (low, high) = f"{gap} points, 95 % interval {interval(one)}, {counted(one['seeds'], 'seed')}", one["interval"]
    above, below = ("beats it", "loses to it") if one["decides"] else ("is above it, which decides nothing", "is below it")
    if low > 0:
        return f"{arm} {above}: {said}, all of it above 0."
    if high < 0:
        return f"{arm} {below}: {said}, all of it below 0."
    return f"{arm} cannot be told apart from it: {said}, which includes 0."


def _table(study: Study) -> Section:
    order = sorted(study.arms, key=lambda name: -(study.accuracy(name) or -1))
    rows, details = [], []
    for name in order:
        arm, networks = study.arms[name], study.arms[name]["networks"]
        label = name + " (control)" * arm["control"] + " ★" * (name == study.control)
        whole = networks.get(ENSEMBLE, {})
        rows.append([label, spread(whole.get("accuracy")),
                     *(spread(networks.get(student, {}).get("accuracy")) for student in study.students),
                     spread(whole.get("validation_accuracy")), spread(whole.get("loss"), 1, 3),
                     spread(whole.get("calibration_error")), f"{study.cost(arm['teacher_flops']):.2f}",
                     f"{study.cost(arm['student_flops']):.2f}", str(len(arm["seeds"]))])
        details += [[label, network, spread(one.get("accuracy")), spread(one.get("validation_accuracy")),
                     spread(one.get("loss"), 1, 3), spread(one.get("calibration_error")), f"{one['parameters']:,}"]
                    for network, one in networks.items()]
    head = ["", "ensemble", *(short(student, 24) for student in study.students), "ensemble, validation", "loss, nats",
            "calibration error", "teachers' cost", "students' cost", "seeds"]
    meant = [[name, study.arms[name]["title"], "; ".join(study.arms[name]["changes"])] for name in order]
    return Section("Arms", [
        "Test accuracy in %, mean ± standard deviation over seeds; loss and calibration error (%) are the ensemble's. Costs "
        "are the arithmetic of training and of teachers' answers, the recipe's pyramid being 1. ★: the best control."], [
        Table("Every arm, the best ensemble first", head, rows,
              marked=frozenset(index for index, name in enumerate(order) if name == study.control)),
        Table("What the arms are", ["", "what it is", "changes to the recipe"], meant, words=frozenset({0, 1, 2})),
        Table("Every network of every arm", ["", "network", "test %", "validation %", "loss, nats", "calibration error %",
                                             "parameters"], details, folded=True, words=frozenset({0, 1}))])


def _differences(study: Study) -> Section | None:
    found = study.differences
    if not found:
        return None
    shown = [one for one in found if one["network"] == ENSEMBLE and has_interval(one)]
    rows = [[one["arm"], one["against"], one["network"], points(one["difference"]), interval(one),
             str(one["seeds"])] for one in found]
    table = Table("All differences, in points", ["arm", "against", "network", "difference", "95 % interval", "seeds"], rows,
                  folded=bool(shown), words=frozenset({0, 1, 2}),
                  marked=frozenset(index for index, one in enumerate(found) if one.get("decides")))
    said = "; ".join(f"{one['arm']} against {one['against']} {points(one['difference'])} "
                     f"{interval(one)}" for one in shown)
    plot = Plot("differences", "Differences between ensembles with 95 % intervals (◆ decides)",
                f"Differences of test accuracy in points with intervals: {said}.", partial(forest, study, shown))
    return Section("Differences", ["Paired differences of test accuracy in points: what is right of 0 is better than "
                                   "what it is compared with."], [plot, table] if shown else [table])


def _compute(study: Study) -> Section | None:
    names = list(study.measured)
    if not names:
        return None
    said = ", ".join(f"{name} {study.cost(study.arms[name]['teacher_flops']):.2f} {percent(study.accuracy(name))}"
                     for name in names)
    return Section("Compute", ["What the teachers cost, training and answers, and the ensemble that comes of it. The line "
                               "joins the arms that none beats at the same or less compute."], [
        Plot("compute", "Teachers' compute and the ensemble's accuracy",
             f"Points for each arm, cost of its teachers and accuracy: {said}.", partial(compute, study, names))])


def _readings(study: Study) -> Section:
    tree = study.tree
    rows = [[name, teacher, percent(accuracy)] for name, arm in study.arms.items()
            for teacher, accuracy in (arm.get("teachers") or {}).items()]
    table = Table("Mean accuracy of every arm's teachers within their classes", ["arm", "teacher", "accuracy"], rows,
                  folded=True, words=frozenset({0, 1}))
    return Section("Readings and teachers", [
        f"The test split of {tree['test_images']} images was read {tree['test_readings']} times in all; {study.runs} runs "
        "are finished. What pkd chose, the best epochs, the best control and its challenger, it chose by the validation "
        "split."],
        [table] * bool(rows))
