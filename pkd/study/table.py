"""study.json as a person reads it."""

from rich.table import Table

from pkd.predictions import ENSEMBLE


def arms_rows(study: dict) -> list[list[str]]:
    """Accuracy in % of every network, mean and standard deviation over seeds; calibration and loss of the ensemble. The
    names of the columns come first.
    """
    names = _networks(study)
    rows = [["arm", "seeds", "teachers' cost", "ensemble, validation", *names, "ECE %", "NLL"]]
    for arm, own in study["arms"].items():
        networks = own["networks"]
        rows.append([arm, str(len(own["seeds"])), f"{own['teacher_flops'] / study['pyramid_flops']:.2f}",
                     _spread(networks[ENSEMBLE]["validation_accuracy"], 100, 1),
                     *(_spread(networks[name]["accuracy"], 100, 1) if name in networks else "" for name in names),
                     _spread(networks[ENSEMBLE]["calibration_error"], 100, 1), _spread(networks[ENSEMBLE]["loss"], 1, 3)])
    return rows


def arms_table(study: dict) -> Table:
    columns, *rows = arms_rows(study)
    out = Table(title=f"{study['recipe']}: accuracy in % on {study['test_images']} test images, mean ± sd over seeds")
    for column in columns:
        out.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        out.add_row(*row)
    return out


def networks_table(study: dict) -> Table:
    """Every student and the ensemble of every arm, with calibration and loss of its own."""
    out = Table(title="every network: mean ± sd over seeds")
    columns = ("arm", "network", "accuracy %", "validation %", "ECE %", "NLL")
    for column in columns:
        out.add_column(column, justify="left" if column in columns[:2] else "right")
    for arm, own in study["arms"].items():
        for name, figures in own["networks"].items():
            out.add_row(arm, name, _spread(figures["accuracy"], 100, 1), _spread(figures["validation_accuracy"], 100, 1),
                        _spread(figures["calibration_error"], 100, 1), _spread(figures["loss"], 1, 3))
    return out


def differences_table(study: dict) -> Table:
    """Of the ensembles with their intervals, of the students without; in points."""
    names = [name for name in _networks(study) if name != ENSEMBLE]
    out = Table(title="differences in points; of the ensemble with its 95 % interval")
    for column in ("arm", "against", ENSEMBLE, "", *names, "seeds"):
        out.add_column(column, justify="left" if column in ("arm", "against") else "right")
    rows: dict[tuple[str, str], dict[str, dict]] = {}
    for one in study["differences"]:
        rows.setdefault((one["arm"], one["against"]), {})[one["network"]] = one
    for (arm, against), own in rows.items():
        whole = own[ENSEMBLE]
        low, high = whole["interval"]
        out.add_row(arm, against + (" (decides)" if whole["decides"] else ""), f"{100 * whole['difference']:+.1f}",
                    f"{100 * low:+.1f} to {100 * high:+.1f}",
                    *(f"{100 * own[name]['difference']:+.1f}" if name in own else "" for name in names),
                    str(whole["seeds"]), style="bold" if whole["decides"] else None)
    return out


def remarks(study: dict) -> list[str]:
    """What the tables do not say."""
    out = [f"{arm}: {own['title']}" for arm, own in study["arms"].items()]
    if study["best_control"]:
        on = study["chosen_on"]
        which = f"seed{'s' * (len(on) > 1)} {', '.join(map(str, on))}" if on else "the seeds that each has"
        out.append(f"best control by validation on {which}: {study['best_control']}"
                   + (f"; the best of the others, and the one that may decide against it: {study['challenger']}"
                      if study["challenger"] else ""))
    out += caveats(study)
    missing = study["missing"]
    if missing:
        out.append(f"not finished: {', '.join(missing[:4])}" + f" and {len(missing) - 4} more" * (len(missing) > 4))
    students = ", ".join(f"{cost:.2f}" for cost in sorted({own["student_flops"] / study["pyramid_flops"]
                                                           for own in study["arms"].values()}))
    out.append("teachers' cost is the arithmetic of their training and answers, the pyramid's being 1"
               + f", the students' {students} in every arm" * bool(students)
               + "; ECE is the expected calibration error, NLL the loss, in the first table the ensemble's")
    return [*out, f"the test split was read {study['test_readings']} times in all"]


def unequal(study: dict) -> list[str]:
    """Whether networks saw batches of different sizes where they should not, or ran on other machines or versions."""
    sizes, made, out = study["micro_batches"], study["made_by"], []
    if len(sizes) > 1:
        out.append(f"students of some arms or seeds saw {' or '.join(map(str, sizes))} samples at once, for they ran on "
                   "other numbers of ranks, in other groups or with other accumulation: their batch statistics differ in "
                   "more than the arm")
    if max(study["world_sizes"], default=1) > 1:
        out.append("a top teacher may have been trained on several ranks, every other one was on one, so that batch "
                   "statistics of the former are of fewer samples")
    if len(made) > 1:
        out.append(f"results are of {' and of '.join(made)}")
    return out


def coverage(study: dict) -> list[str]:
    """What an interval of one seed leaves out."""
    single = any(one["seeds"] == 1 for one in study["differences"])
    return ["intervals of a single seed speak of test images only: another seed may differ by more"] * single


def caveats(study: dict) -> list[str]:
    """Why nothing decides yet, and what else a reader of the differences must know; a sentence each."""
    out = study["undecided"] + coverage(study) + unequal(study)
    if study.get("not_run"):
        out.append(f"controls that were not run: {', '.join(study['not_run'])}; the best control is that of the others")
    if study["dearer"]:
        out.append(f"teachers of {', '.join(study['dearer'])} cost more than the pyramid, for which the controls are not "
                   "made: such an arm decides nothing")
    return out


def _networks(study: dict) -> list[str]:
    """Every network of any arm, the ensemble last."""
    every = dict.fromkeys(name for own in study["arms"].values() for name in own["networks"])
    return [name for name in every if name != ENSEMBLE] + [ENSEMBLE] * (ENSEMBLE in every)


def _spread(figure: list, scale: float, digits: int) -> str:
    mean, sd = figure
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * sd:.{digits}f}" if sd is not None else "")
