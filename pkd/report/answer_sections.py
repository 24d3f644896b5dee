"""The sections of a run's page that go by its predictions: confusion, calibration, agreement. None where there are none."""

from functools import partial

from pkd.report.answer_plots import agreement_plot, confusion_matrix, reliability
from pkd.report.answers import agreement_of, repairs, within_groups, worst_pairs
from pkd.report.facts import Facts
from pkd.report.page import Section, Table
from pkd.report.style import Plot, listed, percent, short


def confusion(facts: Facts) -> Section | None:
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


def calibration(facts: Facts) -> Section | None:
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


def agreement(facts: Facts) -> Section | None:
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
             partial(agreement_plot, found))])
