"""What pages of speeds have in common: the machine and its versions, a table of ratios, one of programs."""

import importlib.metadata
import os
import platform

from pkd.bench import spread
from pkd.hardware import cpu_model


def machine(*packages: str) -> str:
    return f"{os.cpu_count()} cores, {cpu_model()};\n" + ", ".join([
        f"Python {platform.python_version()}", *(f"{name} {importlib.metadata.version(name)}" for name in packages)])


def ratios(rows: list[tuple[str, str, list[float]]]) -> list[str]:
    """rows: figure, what was asked for, the ratio in each round."""
    return ["| figure | asked for, at least | min | median | max |", "|---|---|---|---|---|",
            *(f"| {figure} | {target} | " + " | ".join(f"{value:.2f}" for value in spread(values)) + " |"
              for figure, target, values in rows)]


def speeds(rates: dict[str, list[float]], memory: dict[str, dict[str, int]]) -> list[str]:
    """rates: of each program, in each round; memory: program -> role -> peak bytes of the largest rank."""
    lines = ["| program | images/s: min | median | max | largest rank's memory, MB |", "|---|---|---|---|---|"]
    for name, own in rates.items():
        peak = f"{max(memory[name].values()) / 1e6:.0f}" if name in memory else ""
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in spread(own)) + f" | {peak} |")
    return lines
