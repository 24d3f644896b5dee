"""What is beyond chance when two arms are compared over seeds and test images; pure numpy."""

import numpy as np

RESAMPLES = 2000


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for that of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def crossed_bootstrap(one: np.ndarray, other: np.ndarray, resamples: int = RESAMPLES, level: float = 0.95,
                      seed: int = 0) -> tuple[float, float, float]:
    """The mean of `one` minus that of `other`, and the percentile interval of it.

    one, other: bool or numbers [seeds, images], whether a network was right: paired by seed and image. Seeds and images are
    drawn with replacement, apart from each other, the same ones for both arms (the pigeonhole bootstrap of Owen 2007, which
    errs to the wide side for what seeds and images do together). Of n seeds n - 1 are drawn, because n would make the
    variance between a few seeds too small by (n - 1) / n (Rao and Wu 1988); a single seed is not drawn at all: then the
    interval speaks of test images only.
    """
    gap = one.astype(np.float64) - other.astype(np.float64)
    seeds, images = gap.shape
    chance = np.random.default_rng(seed)
    # Images that differ in the same seeds in the same way are one kind: drawing images is drawing counts of kinds.
    kinds, counts = np.unique(gap, axis=1, return_counts=True)
    drawn = chance.multinomial(images, counts / images, size=resamples) / images  # [resamples, kinds]
    draws = max(1, seeds - 1)
    weight = chance.multinomial(draws, np.full(seeds, 1 / seeds), size=resamples) / draws if seeds > 1 else 1.0
    means = ((drawn @ kinds.T) * weight).sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(gap.mean()), float(low), float(high)
