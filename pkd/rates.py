"""Learning rates: cosine with warm-up by step, or plateau by validation loss, one schedule a network."""

import math

import torch

from pkd.recipe import Optimisation


def cosine(base: float, step: int, steps: int, warmup: int) -> float:
    """Linear rise over `warmup` steps, then half a cosine down to 0 at `steps` (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return base * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Rates:
    """The learning rate of each network at each step; decisions only on values that all ranks share."""

    def __init__(self, settings: list[Optimisation], steps: int):
        self.settings, self.steps = settings, steps
        self.plateau = {}
        for index, own in enumerate(settings):
            if own.schedule == "plateau":
                # torch's scheduler wants an optimizer to write into: one that holds nothing but the rate.
                holder = torch.optim.SGD([torch.zeros(1)], lr=own.lr)
                self.plateau[index] = torch.optim.lr_scheduler.ReduceLROnPlateau(
                    holder, factor=own.factor, patience=own.patience)

    def at(self, step: int) -> list[float]:
        """Rates for optimizer step `step` of the whole run, counted from 0."""
        rates = []
        for index, own in enumerate(self.settings):
            if own.schedule == "cosine":
                rates.append(cosine(own.lr, step, self.steps, own.warmup_steps))
                continue
            rate = self.plateau[index].optimizer.param_groups[0]["lr"] if index in self.plateau else own.lr
            rates.append(rate * min(1.0, (step + 1) / own.warmup_steps) if own.warmup_steps else rate)
        return rates

    def validated(self, losses: list[float]) -> None:
        """Tell the plateau schedules each network's validation loss, once an epoch."""
        for index, scheduler in self.plateau.items():
            scheduler.step(losses[index])

    def to_json(self) -> dict:
        return {str(index): {"lr": s.optimizer.param_groups[0]["lr"], "best": s.best, "bad": s.num_bad_epochs,
                             "epoch": s.last_epoch, "cooldown": s.cooldown_counter}
                for index, s in self.plateau.items()}

    def load_json(self, tree: dict) -> None:
        for index, saved in tree.items():
            s = self.plateau[int(index)]
            s.optimizer.param_groups[0]["lr"] = saved["lr"]
            s.best, s.num_bad_epochs = saved["best"], saved["bad"]
            s.last_epoch, s.cooldown_counter = saved["epoch"], saved["cooldown"]
