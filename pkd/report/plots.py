"""Plots of how a run went: curves by epoch, speed, and how busy its ranks were."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pkd.placement import Placement
from pkd.report.style import Theme, figure, listed, short

BARS = 32  # ranks that are shown one by one
NAMED = 12  # networks that a legend names


def curves(lines: list[dict], students: list[str], theme: Theme) -> Figure:
    """Validation accuracy and loss, training loss and learning rate by epoch, of every student and the ensemble."""
    out = figure(10.4, 6.0)
    (accuracy, loss), (train, rate) = out.subplots(2, 2, sharex=True)
    epochs = [line["epoch"] + 1 for line in lines]
    marker = "o" if len(epochs) < 25 else None
    for index, name in enumerate(students):
        style = {"color": theme.colour(index), "ls": ("-", "--", "-.", ":")[index // len(theme.colours) % 4], "lw": 1.4,
                 "marker": marker, "ms": 3, "label": short(name, 24)}
        scores = [line["validation"][name] for line in lines]
        accuracy.plot(epochs, [100 * one["accuracy"] for one in scores], **style)
        loss.plot(epochs, [one["loss"] for one in scores], **style)
        train.plot(epochs, [line["train"][name]["loss"] for line in lines], **style)
        rate.plot(epochs, [line["learning_rate"][name] for line in lines], **style)
        kept = max(range(len(lines)), key=lambda i: (scores[i]["accuracy"], -scores[i]["loss"]))
        accuracy.plot(epochs[kept], 100 * scores[kept]["accuracy"], marker="*", ms=10, color=style["color"], ls="none")
    style = {"color": theme.ink, "lw": 2.2, "marker": marker, "ms": 3, "label": "ensemble"}
    accuracy.plot(epochs, [100 * line["ensemble"]["accuracy"] for line in lines], **style)
    loss.plot(epochs, [line["ensemble"]["loss"] for line in lines], **style)
    for axes, title in ((accuracy, "validation accuracy, % (★ the weights that are kept)"), (loss, "validation loss, nats"),
                        (train, "training loss, all terms"), (rate, "learning rate at the epoch's end")):
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    rate.set_ylim(bottom=0)
    for axes in (train, rate):
        axes.set_xlabel("epoch")
    _legend(out, accuracy)
    return out


def _legend(out: Figure, axes: Axes) -> None:
    """Below everything; of very many networks the last ones, the ensemble among them, and as many others as fit."""
    handles, labels = axes.get_legend_handles_labels()
    chosen = list(zip(handles, labels))
    if len(chosen) > NAMED:
        chosen = [*chosen[:NAMED - 1], chosen[-1]]
    out.legend(*zip(*chosen), loc="outside lower center", ncols=min(6, len(chosen)))


def speed(lines: list[dict], theme: Theme) -> Figure:
    """Images per second, and the share of time that rank 0 waited for teachers, by epoch."""
    out = figure(10.4, 2.7)
    images, wait = out.subplots(1, 2)
    epochs = [line["epoch"] + 1 for line in lines]
    marker = "o" if len(epochs) < 25 else None
    images.plot(epochs, [line["images_per_second"] for line in lines], color=theme.colour(0), marker=marker, ms=3)
    waited = [100 * line["wait_seconds"] / max(line["seconds"], 1e-9) for line in lines]
    wait.plot(epochs, waited, color=theme.colour(1), marker=marker, ms=3)
    for axes, title in ((images, "images per second"), (wait, "waiting for soft targets, % of the time")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    images.set_ylim(0, 1.1 * max(line["images_per_second"] for line in lines))
    wait.set_ylim(0, max(10, *(1.1 * value for value in waited)))
    return out


def bars(placement: Placement, busy: list[float], most: int = BARS) -> list[tuple[str, str, float, str]]:
    """(ranks, role, mean busy share, teachers) of each bar: a rank, or ranks of one role that follow each other; pure."""
    size = -(-placement.world // most)
    out = []
    for first, last in ((0, placement.student_ranks), (placement.student_ranks, placement.world)):
        for start in range(first, last, size):
            ranks = range(start, min(start + size, last))
            held = list(dict.fromkeys(name for rank in ranks for name in placement.answers_for(rank)))
            label = f"rank {start}" if len(ranks) == 1 else f"ranks {start}-{ranks[-1]}"
            out.append((label, placement.role(start), sum(busy[rank] for rank in ranks) / len(ranks), listed(held, 44)))
    return out


def occupation(placement: Placement, busy: list[float], theme: Theme) -> Figure:
    """Busy and idle share of every rank, a bar each, with the teachers that it answers for."""
    rows = bars(placement, busy)
    out = figure(10.4, 0.75 + 0.3 * len(rows))
    axes = out.subplots()
    colour = {"student": theme.colour(0), "teacher": theme.colour(1)}
    for at, (_, role, share, held) in enumerate(rows):
        axes.barh(at, 100 * share, color=colour[role], height=0.72)
        axes.barh(at, 100 - 100 * share, left=100 * share, facecolor=theme.box, hatch="////", height=0.72)
        inside = share > 0.12
        axes.text(100 * share + (-1 if inside else 1), at, f"{100 * share:.0f} %", va="center",
                  ha="right" if inside else "left", color=theme.surface if inside else theme.ink, weight="bold")
        axes.text(101.5, at, held, va="center", fontsize=8, color=theme.muted)
    axes.set_yticks(range(len(rows)), [f"{label} · {role}" for label, role, _, _ in rows])
    axes.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), xlabel="busy share of the epochs' time, %; hatched: waiting")
    axes.grid(False, axis="y")
    if any(held for *_, held in rows):
        axes.text(101.5, -0.85, "answers for", va="center", fontsize=8, color=theme.muted)
    return out
