"""A run as a page: what it gave, how it went, who was where; and plainly what is not there yet."""

import json
import time
from pathlib import Path

from pkd.errors import UserError
from pkd.report.answer_sections import agreement, calibration, confusion
from pkd.report.facts import Facts, gather
from pkd.report.page import Page
from pkd.report.sections import placement, pyramid, result, training
from pkd.report.style import percent


def page_of(path: Path) -> Page:
    """Raises UserError where a file of the run is damaged."""
    try:
        return _page(gather(path))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"a file of run {path} is not as pkd wrote it ({type(error).__name__}: {error}): restore it, or "
                        "start the phase that writes it again") from error


def _page(facts: Facts) -> Page:
    sections = [result(facts), training(facts), pyramid(facts), placement(facts), confusion(facts),
                calibration(facts), agreement(facts)]
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
    if not facts.teachers and facts.recipe["objective"]["kind"] != "alone":
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
        best = max(summary["students"], key=lambda name: summary["students"][name]["validation_accuracy"])
        return [(percent(summary["ensemble"]["accuracy"]), f"ensemble of {len(summary['students'])} students, test"),
                (percent(summary["students"][best]["accuracy"]), f"student {best}, the best by validation, test"), *beside,
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
