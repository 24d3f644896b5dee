"""The sections of a run's page that need no predictions: result, training, pyramid, placement; None where they are empty."""

from functools import partial

from pkd.report.facts import Facts
from pkd.report.page import Section, Table
from pkd.report.plots import curves, occupation, speed
from pkd.report.style import NOTHING, Plot, counted, percent, short
from pkd.report.tree import places, tree


def result(facts: Facts) -> Section | None:
    summary = facts.summary
    if not summary:
        return None
    rows = [[name, percent(one["accuracy"], 2), percent(one.get("validation_accuracy"), 2), f"{one['loss']:.4f}",
             percent(one.get("calibration_error")), f"{one['parameters']:,}"]
            for name, one in [*summary["students"].items(), ("ensemble", summary["ensemble"])]]
    table = Table("Students and their ensemble (mean of logits)", ["", "test accuracy", "validation accuracy",
                  "test loss, nats", "calibration error", "parameters"], rows, marked=frozenset({len(rows) - 1}))
    whole = "" if summary["complete"] else " This was a smoke run."
    read = f"{summary['test_images']} test images, read {counted(summary['test_readings'], 'time')}.{whole}"
    return Section("Result", [f"{read} Calibration error: the mean distance between confidence and accuracy."], [table])


def training(facts: Facts) -> Section | None:
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


def pyramid(facts: Facts) -> Section | None:
    if not facts.teachers:
        return None
    names, teachers = facts.classes, facts.teachers
    splits = " or ".join(sorted({teacher.split for teacher in teachers} - {""}))
    rows = [[teacher.name, str(teacher.level), str(len(teacher.classes)), percent(teacher.accuracy, 2), teacher.split,
             NOTHING if teacher.parameters is None else f"{teacher.parameters:,}",
             ", ".join(short(names[index], 40) for index in teacher.classes if index < len(names))] for teacher in teachers]
    text = [f"{counted(len(teachers), 'teacher')} on {counted(1 + teachers[-1].level, 'level')}. Accuracy is measured on "
            f"images of a teacher's own classes only{f', of the {splits} split' if splits else ''}."]
    drawn = len(places(teachers))
    text += [f"The lowest {counted(len(teachers) - drawn, 'teacher')} are in the table only."] * (drawn < len(teachers))
    training = [f"{name}: {said}" for name, said in facts.standing.teachers.items() if said not in ("done", "not begun")]
    text += [f"Still to be trained to the end: {'; '.join(training)}."] * bool(training)
    measured = ", ".join(f"{teacher.name} {len(teacher.classes)} classes {percent(teacher.accuracy)}"
                         for teacher in teachers[:15])
    return Section("Pyramid", text, [
        Plot("pyramid", "Teachers, their classes and their accuracy", f"A tree of teachers from the top down: {measured}"
             f"{' and more, in the table below' if len(teachers) > 15 else ''}.", partial(tree, teachers, names)),
        Table("All teachers and their classes", ["", "level", "classes", "accuracy", "split", "parameters", "which"], rows,
              folded=True, words=frozenset({0, 4, 6}))])


def placement(facts: Facts) -> Section | None:
    placed = facts.placement
    if not placed:
        return None
    asked = f"{counted(len(placed.sources), 'source')} of soft targets" if placed.sources else \
        "no teacher asked" if facts.recipe["objective"]["kind"] == "alone" else "soft targets from an archive"
    text = [f"{placed.kind}: {placed.student_ranks} of {counted(placed.world, 'rank')} for students, {asked}."]
    if placed.why:
        text.append(placed.why)
    if facts.placed_since:
        text.append(f"So since epoch {facts.placed_since + 1}; the epochs before were of another placement.")
    shares = [(line["busy"], line["seconds"]) for line in facts.lines[facts.placed_since:]
              if len(line.get("busy", ())) == placed.world]
    parts = []
    if shares:
        total = max(1e-9, sum(seconds for _, seconds in shares))
        busy = [sum(own[rank] * seconds for own, seconds in shares) / total for rank in range(placed.world)]
        said = ", ".join(f"rank {rank} ({placed.role(rank)}) {percent(share, 0)}" for rank, share in enumerate(busy[:16]))
        text.append("Busy: a student rank while it does not wait for soft targets, a rank with teachers alone while they "
                    "answer.")
        parts.append(Plot("placement", "Busy and waiting by rank", f"Bars of the busy share of each rank: {said}"
                          f"{' and so on' if len(busy) > 16 else ''}.", partial(occupation, placed, busy)))
    elif facts.lines:
        text.append("How busy each rank was is not recorded for this placement.")
    hosts = {host["rank"]: host for host in facts.hosts} if len(facts.hosts) == placed.world else {}
    rows = [[f"rank {rank}", placed.role(rank), *(hosts.get(rank, {}).get(key, NOTHING) for key in ("host", "device")),
             ", ".join(placed.answers_for(rank)) or NOTHING] for rank in range(placed.world)]
    parts.append(Table("Every rank", ["", "role", "node", "device", "answers for"], rows, folded=len(rows) > 8,
                       words=frozenset(range(5))))
    return Section("Placement", text, parts)
