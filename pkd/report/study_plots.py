"""Plots of a study: differences with their intervals, and what the teachers' compute buys."""

from matplotlib.figure import Figure

from pkd.report.study_facts import ENSEMBLE, Study, interval, points
from pkd.report.style import Theme, figure, short


def forest(study: Study, shown: list[dict], theme: Theme) -> Figure:
    """One row a difference, grouped by what the arms are compared with; whatever decides comes first."""
    against = dict.fromkeys(one["against"] for one in sorted(shown, key=lambda one: not one.get("decides")))
    out = figure(10.4, 0.9 + 0.34 * (len(shown) + len(against)))
    axes = out.subplots()
    labels: list[str] = []
    heads = []
    for other in against:
        heads.append(len(labels))
        labels.append(f"against {short(other, 40)}")
        for one in sorted((one for one in shown if one["against"] == other), key=lambda one: -one["difference"]):
            _row(axes, len(labels), one, theme)
            labels.append(short(one["arm"], 46))
    axes.axvline(0, color=theme.ink, lw=1)
    axes.set_yticks(range(len(labels)), labels)
    for at in heads:
        axes.get_yticklabels()[at].set_weight("bold")
    axes.set(ylim=(len(labels) - 0.4, -0.6), xlabel="difference of the ensemble's test accuracy, points")
    axes.grid(False, axis="y")
    return out


def _row(axes, at: int, one: dict, theme: Theme) -> None:
    low, high = (100 * end for end in one["interval"])
    colour = theme.colour(2) if low > 0 else theme.colour(1) if high < 0 else theme.muted
    decides = bool(one.get("decides"))
    axes.plot([low, high], [at, at], color=colour, lw=2.4, solid_capstyle="butt")
    axes.plot(100 * one["difference"], at, "D" if decides else "o", color=colour, ms=8 if decides else 5)
    axes.annotate(f"{points(one['difference'])} {interval(one)}", (1.01, at), xycoords=("axes fraction", "data"),
                  va="center", fontsize=8, color=theme.ink)


def best_for_cost(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, accuracy) that no other reaches at the same or less cost, cheapest first; pure."""
    best, out = float("-inf"), []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            out.append(index)
    return out


def compute(study: Study, names: list[str], theme: Theme) -> Figure:
    """Numbered points, which the legend names: names beside the points would cover each other."""
    out = figure(10.4, max(3.6, 1.2 + 0.22 * len(names)))
    axes = out.subplots()
    names = sorted(names, key=lambda name: -study.accuracy(name))
    at = [(study.cost(study.arms[name]["teacher_flops"]), 100 * study.accuracy(name)) for name in names]
    path = best_for_cost(at)
    axes.plot([at[i][0] for i in path], [at[i][1] for i in path], color=theme.muted, lw=1, ls="--", zorder=1)
    for number, (name, point) in enumerate(zip(names, at), 1):
        control, deviation = study.arms[name]["control"], study.arms[name]["networks"][ENSEMBLE]["accuracy"][1]
        axes.errorbar(*point, yerr=None if deviation is None else 100 * deviation, fmt="s" if control else "o", ms=13,
                      color=theme.colour(7 if control else 0), elinewidth=1.2, capsize=3, zorder=3 * number,
                      label=f"{number}  {short(name, 38)}{' (control)' if control else ''}")
        axes.annotate(str(number), point, ha="center", va="center", fontsize=7.5, color=theme.surface, weight="bold",
                      zorder=3 * number + 1)
    axes.margins(0.08, 0.12)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    axes.set(xlabel="cost of the teachers' training and answers, the pyramid's being 1",
             title="ensemble's test accuracy, % (mean ± sd over seeds)")
    handles, labels = axes.get_legend_handles_labels()
    out.legend([handle[0] for handle in handles], labels, loc="outside right upper", markerscale=0.6)
    return out
