"""Plots of what the predictions of a run tell; the numbers are report_answers' own."""

from itertools import groupby

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from pkd.predictions import BINS, Predictions
from pkd.report.answers import agreement_of, bins, cells, confused, group_keys
from pkd.report.facts import Teacher
from pkd.report.style import Theme, figure, short

NAMED = 40  # cells of a confusion matrix that have the name of their class beside them
NUMBERED = 15  # cells that hold their number
LABELLED = 30  # groups that have the name of their teacher beside them


def confusion_matrix(predictions: Predictions, teachers: list[Teacher], classes: tuple[str, ...], theme: Theme) -> Figure:
    """Of the ensemble; rows are true classes, sorted by the pyramid's groups, in shares of a row."""
    keys = group_keys(teachers, len(classes)) if teachers else [()] * len(classes)
    order, cell = cells(keys)
    counts = confused(predictions.labels.numpy(), predictions.predicted[-1].numpy(), cell)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = 7.4 if len(counts) > NAMED else 3.4 + 0.14 * len(counts)
    out = figure(side + 1.2, side)
    axes = out.subplots()
    image = axes.imshow(100 * share, cmap=theme.shades, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.grid(False)
    bar = out.colorbar(image, ax=axes, shrink=0.6, ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.ax.set_title("% of row", fontsize=8)
    bar.outline.set_visible(False)
    firsts = [keys[index] for _, index in sorted({int(cell[i]): int(i) for i in reversed(order)}.items())]
    for depth in range(len(keys[0]), 1, -1):
        edges = [at for at in range(1, len(firsts)) if firsts[at][:depth] != firsts[at - 1][:depth]]
        if len(edges) <= 2 * LABELLED:
            for at in edges:
                for line in (axes.axhline, axes.axvline):
                    line(at - 0.5, color=theme.ink, lw=1.4 if depth == 2 else 0.5)
    if len(counts) == len(classes) and len(counts) <= NAMED:
        names = [short(classes[index], 16) for index in order]
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    else:
        _label_groups(axes, firsts, teachers)
    if len(counts) <= NUMBERED:
        for row, column in np.argwhere(counts):
            value = share[row, column]
            axes.text(column, row, f"{100 * value:.0f}" if value >= 0.01 else "<1", ha="center", va="center", fontsize=8,
                      color=theme.on(value ** 0.5))
    axes.set(xlabel="predicted by the ensemble", ylabel="true class")
    return out


def _label_groups(axes, firsts: list[tuple[int, ...]], teachers: list[Teacher]) -> None:
    """Names of the lowest level's teachers that are few enough, at the middle of their cells."""
    axes.set_xticks([])
    axes.set_yticks([])
    for depth in range(len(firsts[0]), 1, -1):
        runs = [list(run) for _, run in groupby(range(len(firsts)), key=lambda at: firsts[at][:depth])]
        if len(runs) <= LABELLED:
            level = sorted({teacher.level for teacher in teachers})[depth - 1]
            members = [teacher.name for teacher in teachers if teacher.level == level]
            places = [firsts[run[0]][depth - 1] for run in runs]
            names = [members[place] if place >= 0 else "" for place in places]
            middles = [(run[0] + run[-1]) / 2 for run in runs]
            axes.set_xticks(middles, names, rotation=90, fontsize=8)
            axes.set_yticks(middles, names, fontsize=8)
            return


def reliability(predictions: Predictions, theme: Theme) -> Figure:
    """Accuracy by confidence of every network, and how many images the ensemble is how sure of."""
    out = figure(10.4, 4.4)
    axes, counts = out.subplots(1, 2, width_ratios=(1.25, 1))
    axes.plot([0, 100], [0, 100], color=theme.muted, lw=1, ls=":", label="as right as sure")
    for index, name in enumerate(predictions.names):
        ensemble = index == len(predictions.names) - 1
        number, sure, right = bins(predictions.confidence[index].numpy(), predictions.correct[index].numpy())
        there = number >= max(1, min(5, number.sum() // 100))  # a bin of a few images says little
        axes.plot(100 * sure[there], 100 * right[there], marker="o", ms=4 if ensemble else 3, lw=2.2 if ensemble else 1.2,
                  color=theme.ink if ensemble else theme.colour(index), label=short(name, 24))
    axes.set(title="accuracy by confidence", xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 101), ylim=(0, 101))
    if len(predictions.names) <= 12:
        axes.legend(loc="best")
    number, _, right = bins(predictions.confidence[-1].numpy(), predictions.correct[-1].numpy())
    left = 100 * np.arange(BINS) / BINS
    wrong = number * (1 - np.nan_to_num(right))
    counts.bar(left, number - wrong, 100 / BINS * 0.9, align="edge", color=theme.colour(0), label="right")
    counts.bar(left, wrong, 100 / BINS * 0.9, number - wrong, align="edge", color=theme.colour(1), hatch="////",
               label="wrong")
    counts.set(title="test images by the ensemble's confidence", xlabel="confidence, %", xlim=(0, 100))
    counts.legend(loc="best")
    return out


def agreement_plot(predictions: Predictions, theme: Theme) -> Figure:
    """How often two networks say the same; and how often the ensemble is right by how many students are."""
    share, names = agreement_of(predictions), [short(name, 16) for name in predictions.names]
    out = figure(10.4, max(3.4, 1.6 + 0.3 * len(names)))
    pairs, ensemble = out.subplots(1, 2)
    least = share.min()
    span = max(1e-9, 1 - least)
    pairs.imshow(share, cmap=theme.shades, vmin=least - 0.2 * span, vmax=1 + 0.4 * span)
    pairs.grid(False)
    pairs.set_xticks(range(len(names)), names, rotation=90 if len(names) > 5 else 0, fontsize=8)
    pairs.set_yticks(range(len(names)), names, fontsize=8)
    pairs.set_title("same answer, % of test images")
    if len(names) <= 16:
        for row, column in np.ndindex(share.shape):
            pairs.text(column, row, f"{100 * share[row, column]:.1f}", ha="center", va="center", fontsize=8,
                       color=theme.on((share[row, column] - least + 0.2 * span) / (1.6 * span)))
    right = predictions.correct.numpy()
    count = right[:-1].sum(0)
    for number in range(len(right)):
        mine = right[-1][count == number]
        if len(mine):
            ensemble.barh(number, 100 * mine.mean(), color=theme.colour(0), height=0.7)
            ensemble.barh(number, 100 - 100 * mine.mean(), left=100 * mine.mean(), facecolor=theme.box, hatch="////",
                          height=0.7)
    images = np.bincount(count, minlength=len(right))
    ensemble.set_yticks(range(len(right)), [f"{number} right · {images[number]} images" for number in range(len(right))])
    ensemble.set(xlim=(0, 100), title="ensemble right, %, by how many students are")
    ensemble.grid(False, axis="y")
    return out
