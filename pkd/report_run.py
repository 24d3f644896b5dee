"""A run as a page: what it gave, how it went, who was where; and plainly what is not there yet."""

import json
import time
from functools import partial
from pathlib import Path

from pkd.report_answer_plots import agreement, confusion_matrix, reliability
from pkd.report_answers import agreement_of, repairs, within_groups, worst_pairs
from pkd.report_facts import Facts, gather
from pkd.report_page import Page, Section, Table
from pkd.report_plots import curves, occupation, speed
from pkd.report_style import NOTHING, Plot, listed, percent, short
from pkd.report_tree import tree


def page_of(path: Path) -> Page:
    """Raises UserError where a file of the run is damaged."""
    facts = gather(path)
    sections = [_result(facts), _training(facts), _pyramid(facts), _placement(facts), _confusion(facts),
                _calibration(facts), _agreement(facts)]
    recipe = facts.recipe
    subtitle = (f"{recipe['data']['name']}, {len(facts.classes) or 'unknown'} classes · {recipe['objective']['kind']} "
                f"objective · seed {recipe['seed']} · identity {facts.identity[:12]} · {_where_it_stands(facts)}")
    return Page(f"Run {recipe['name']}", subtitle, _cards(facts), _notes(facts), [s for s in sections if s],
                json.dumps(recipe, indent=2, ensure_ascii=False))


def _where_it_stands(facts: Facts) -> str:
    stands = facts.standing
    if stands.phase == "done":
        return "finished and evaluated " + time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.summary["evaluated"]))
    return f"distillation {stands.distill}, epoch {stands.epoch} of {stands.epochs}" if stands.distill != "none" else \
        f"{stands.teachers_done} of {len(stands.teachers)} teachers trained"


def _notes(facts: Facts) -> list[str]:
    stands, notes = facts.standing, []
    if stands.why:
        notes.append(f"The last start was refused: {stands.why}")
    if not facts.teachers:
        notes.append("The pyramid is not there: no teacher has been trained yet, or their files are gone.")
    elif stands.teachers_done < len(stands.teachers):
        notes.append(f"{stands.teachers_done} of {len(stands.teachers)} teachers are trained.")
    if not facts.lines:
        notes.append("No epoch of distillation has ended yet, so there are no curves.")
    elif stands.distill != "finished":
        notes.append(f"Distillation is not finished ({stands.distill}): epoch {stands.epoch} of {stands.epochs} is the last "
                     "that ended; the figures are of the validation split.")
    if facts.summary and not stands.evaluated:
        notes.append("The figures on the test split are not of these students on the whole of it (a smoke run, or "
                     "students of before): run pkd evaluate.")
    elif not facts.summary and stands.distill == "finished":
        notes.append("The test split has not been read yet: run pkd evaluate for what is measured on it.")
    if facts.summary and not facts.predictions:
        notes.append("predictions.json is not there: run pkd evaluate again for confusion, calibration and agreement.")
    return notes


def _cards(facts: Facts) -> list[tuple[str, str]]:
    top = next((teacher for teacher in facts.teachers if teacher.accuracy is not None), None)
    beside = [(percent(top.accuracy), f"top teacher, {top.split}")] if top and top.level == 0 else []
    summary = facts.summary
    if summary:
        best = max(summary["students"], key=lambda name: summary["students"][name]["accuracy"])
        return [(percent(summary["ensemble"]["accuracy"]), f"ensemble of {len(summary['students'])} students, test"),
                (percent(summary["students"][best]["accuracy"]), f"best student, {best}, test"), *beside,
                (_count(summary["ensemble"]["parameters"]), "parameters of the ensemble"
                 + (f", top teacher {_count(top.parameters)}" if beside and top.parameters else "")),
                (f"{summary['images_per_second']:,.0f}", "training images per second, median epoch")]
    if not facts.lines:
        return beside
    last = facts.lines[-1]
    best = max(facts.students, key=lambda name: last["validation"][name]["accuracy"])
    return [(percent(last["ensemble"]["accuracy"]), f"ensemble, validation, epoch {last['epoch'] + 1}"),
            (percent(last["validation"][best]["accuracy"]), f"best student, {best}, validation"), *beside,
            (f"{last['images_per_second']:,.0f}", "training images per second")]


def _count(number: int) -> str:
    """1.2 k, 3.4 M: three digits are enough."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _result(facts: Facts) -> Section | None:
    summary = facts.summary
    if not summary:
        return None
    rows = [[name, percent(one["accuracy"], 2), percent(one.get("validation_accuracy"), 2), f"{one['loss']:.4f}",
             percent(one.get("calibration_error")), f"{one['parameters']:,}"]
            for name, one in [*summary["students"].items(), ("ensemble", summary["ensemble"])]]
    table = Table("Students and their ensemble (mean of logits)", ["", "test accuracy", "validation accuracy",
                  "test loss, nats", "calibration error", "parameters"], rows, marked=frozenset({len(rows) - 1}))
    whole = "" if summary["complete"] else " This was a smoke run."
    return Section("Result", [f"{summary['test_images']} test images, read {summary['test_readings']} time(s).{whole} "
                              "Calibration error: the mean distance between confidence and accuracy."], [table])


def _training(facts: Facts) -> Section | None:
    if not facts.lines:
        return None
    lines, last = facts.lines, facts.lines[-1]
    said = ", ".join(f"{name} {percent(one['accuracy'])}" for name, one in last["validation"].items())
    waited = sum(line["wait_seconds"] for line in lines) / max(1e-9, sum(line["seconds"] for line in lines))
    memory = max((line.get("peak_memory_bytes") or {} for line in lines), key=lambda one: max(one.values(), default=0))
    peaks = ", ".join(f"{role} {size / 2**20:,.0f} MiB" for role, size in memory.items() if size)
    return Section("Training", [
        f"{len(lines)} of {facts.standing.epochs} epochs, {last['step']} steps, {sum(one['seconds'] for one in lines):,.0f} "
        f"seconds; waiting for soft targets took {percent(waited)} of them. Peak memory of the largest rank by role: "
        f"{peaks or 'not recorded'}."], [
        Plot("curves", "Curves by epoch", f"Four curves by epoch for each student and the ensemble: validation accuracy, "
             f"validation loss, training loss, learning rate. Validation accuracy after epoch {last['epoch'] + 1}: {said}, "
             f"ensemble {percent(last['ensemble']['accuracy'])}.", partial(curves, lines, facts.students)),
        Plot("speed", "Speed and waiting", f"Images per second by epoch, in the last one {last['images_per_second']:.0f}; "
             f"share of the time waited for soft targets, {percent(waited)} over all epochs.", partial(speed, lines))])


def _pyramid(facts: Facts) -> Section | None:
    if not facts.teachers:
        return None
    names, teachers = facts.classes, facts.teachers
    splits = sorted({teacher.split for teacher in teachers} - {""})
    rows = [[teacher.name, str(teacher.level), str(len(teacher.classes)), percent(teacher.accuracy, 2), teacher.split,
             NOTHING if teacher.parameters is None else f"{teacher.parameters:,}",
             ", ".join(short(names[index], 40) for index in teacher.classes if index < len(names))] for teacher in teachers]
    state = [f"{name}: {said}" for name, said in facts.standing.teachers.items() if said != "done"]
    measured = ", ".join(f"{teacher.name} {len(teacher.classes)} classes {percent(teacher.accuracy)}"
                         for teacher in teachers[:15])
    return Section("Pyramid", [
        f"{len(teachers)} teachers on {1 + teachers[-1].level} level(s). Accuracy is measured on images of a teacher's own "
        f"classes only{', of the ' + ' or '.join(splits) + ' split' if splits else ''}."] + ["; ".join(state) + "."] * bool(
            state and len(state) < len(facts.standing.teachers)), [
        Plot("pyramid", "Teachers, their classes and their accuracy", f"A tree of teachers from the top down: {measured}"
             f"{' and more, in the table below' if len(teachers) > 15 else ''}.", partial(tree, teachers, names)),
        Table("All teachers and their classes", ["", "level", "classes", "accuracy", "split", "parameters", "which"], rows,
              folded=True, words=frozenset({0, 4, 6}))])


def _placement(facts: Facts) -> Section | None:
    placement = facts.placement
    if not placement:
        return None
    text = [f"{placement.kind}: {placement.student_ranks} of {placement.world} rank(s) train students"
            + (f", {len(placement.sources)} source(s) of soft targets." if placement.sources else ", no teacher is asked.")]
    if placement.why:
        text.append(placement.why)
    shares = [(line["busy"], line["seconds"]) for line in facts.lines if len(line.get("busy", ())) == placement.world]
    parts = []
    if shares:
        total = max(1e-9, sum(seconds for _, seconds in shares))
        busy = [sum(own[rank] * seconds for own, seconds in shares) / total for rank in range(placement.world)]
        said = ", ".join(f"rank {rank} ({placement.role(rank)}) {percent(share, 0)}" for rank, share in enumerate(busy[:16]))
        text.append("Busy: a student rank while it does not wait for soft targets, a rank with teachers alone while they "
                    "answer.")
        parts.append(Plot("placement", "Busy and waiting by rank", f"Bars of the busy share of each rank: {said}"
                          f"{' and so on' if len(busy) > 16 else ''}.", partial(occupation, placement, busy)))
    elif facts.lines:
        text.append("How busy each rank was is not recorded for this placement.")
    hosts = {host["rank"]: host for host in facts.hosts} if len(facts.hosts) == placement.world else {}
    rows = [[f"rank {rank}", placement.role(rank), *(hosts.get(rank, {}).get(key, NOTHING) for key in ("host", "device")),
             ", ".join(placement.answers_for(rank)) or NOTHING] for rank in range(placement.world)]
    parts.append(Table("Every rank", ["", "role", "node", "device", "answers for"], rows, folded=len(rows) > 8,
                       words=frozenset(range(5))))
    return Section("Placement", text, parts)


def _confusion(facts: Facts) -> Section | None:
    found, names = facts.predictions, facts.classes
    if not found:
        return None
    labels, said = found.labels.numpy(), found.predicted[-1].numpy()
    pairs = worst_pairs(labels, said, 10)
    rows = [[short(names[true], 60), short(names[taken], 60), str(count), percent(count / max(1, (labels == true).sum()))]
            for true, taken, count in pairs]
    wrong = int((labels != said).sum())
    within = within_groups(labels, said, facts.teachers, len(names))
    text = [f"The ensemble is wrong on {wrong} of {len(labels)} test images. Classes are sorted by the pyramid's groups"
            + (", and joined within groups where they are too many to be seen." if len(names) > 100 else ".")]
    if wrong and within:
        text.append("Errors between two classes that one teacher of a level tells apart: "
                    + ", ".join(f"level {level} {percent(share, 0)}" for level, share in within.items()) + ".")
    worst = f"Most often {rows[0][0]} is taken for {rows[0][1]}, {rows[0][2]} times." if rows else "No image is confused."
    return Section("Confusion", text, [
        Plot("confusion", "Confusion matrix of the ensemble", f"A matrix of true by predicted classes in shares of a row, "
             f"{len(labels) - wrong} of {len(labels)} images on its diagonal. {worst}",
             partial(confusion_matrix, found, facts.teachers, names)),
        *[Table("Most frequent confusions", ["true class", "taken for", "images", "of its class"], rows,
                words=frozenset({0, 1}))] * bool(rows)])


def _calibration(facts: Facts) -> Section | None:
    found = facts.predictions
    if not found:
        return None
    errors = ", ".join(f"{name} {percent(error)}" for name, error in zip(found.names, found.calibration_errors()))
    sure, right = found.confidence[-1].mean().item(), found.correct[-1].double().mean().item()
    way = "more sure than right" if sure > right else "less sure than right"
    return Section("Calibration", [
        f"On average the ensemble is {way}: confidence {percent(sure)}, accuracy {percent(right)}."], [
        Plot("reliability", "Reliability", f"Accuracy by confidence of every network beside the diagonal, and test images "
             f"by confidence. Expected calibration errors: {errors}.", partial(reliability, found))])


def _agreement(facts: Facts) -> Section | None:
    found = facts.predictions
    if not found or len(found.names) < 3:  # one student is its own ensemble
        return None
    counts, share = repairs(found), agreement_of(found)[:-1, :-1]
    students = len(share)
    mean = (share.sum() - students) / max(1, students * (students - 1))
    some, repaired = counts["some_wrong"], counts["repaired"]
    return Section("Agreement", [
        f"Two students give the same answer on {percent(mean)} of the test images on average. On {some} images at least one "
        f"student is wrong; the ensemble repairs {repaired} of them ({percent(repaired / max(1, some), 0)}). It is right on "
        f"{counts['against_all']} images that every student gets wrong, and "
        f"wrong on {counts['lost']} that some student gets right."], [
        Plot("agreement", "Who says the same, and when the ensemble is right", f"A matrix of pairwise agreement of "
             f"{listed(list(found.names), 200)}; and the ensemble's accuracy by how many students are right.",
             partial(agreement, found))])
