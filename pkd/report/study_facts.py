"""What study.json tells for a report, and its figures as words."""

from dataclasses import dataclass

from pkd.report.style import NOTHING

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Study:
    """tree: study.json as `pkd study` writes it; a difference and the ends of its interval are fractions."""

    tree: dict

    @property
    def arms(self) -> dict[str, dict]:
        return self.tree["arms"]

    @property
    def control(self) -> str | None:
        """The best control, chosen by validation."""
        return self.tree.get("best_control")

    @property
    def students(self) -> list[str]:
        return list(dict.fromkeys(name for arm in self.arms.values() for name in arm["networks"] if name != ENSEMBLE))

    @property
    def runs(self) -> int:
        """Arms times seeds that are done."""
        return sum(len(arm["seeds"]) for arm in self.arms.values())

    @property
    def differences(self) -> list[dict]:
        return [one for one in self.tree["differences"] if one["difference"] is not None]

    @property
    def judged(self) -> list[dict]:
        """Ensembles' differences from the best control: the one that decides, other arms, the largest first, controls."""
        return sorted((one for one in self.differences if one["against"] == self.control and one["network"] == ENSEMBLE),
                      key=lambda one: (not one["decides"], self.arms[one["arm"]]["control"], -one["difference"]))

    @property
    def measured(self) -> dict[str, dict]:
        """The arms that have an accuracy of the ensemble."""
        return {name: arm for name, arm in self.arms.items() if self.accuracy(name) is not None}

    def accuracy(self, arm: str) -> float | None:
        """The ensemble's mean on the test split."""
        return (self.arms[arm]["networks"].get(ENSEMBLE, {}).get("accuracy") or [None])[0]

    def cost(self, flops: float) -> float:
        """Relative to what the recipe's pyramid costs."""
        return flops / self.tree["pyramid_flops"]


def spread(pair: list | None, scale: float = 100, digits: int = 2) -> str:
    """mean ± standard deviation; without the latter where there is one seed."""
    if not pair or pair[0] is None:
        return NOTHING
    mean, deviation = pair
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * deviation:.{digits}f}" if deviation is not None else "")


def points(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def has_interval(one: dict) -> bool:
    return bool(one.get("interval")) and None not in one["interval"]


def interval(one: dict) -> str:
    return f"[{points(one['interval'][0])}, {points(one['interval'][1])}]" if has_interval(one) else NOTHING
