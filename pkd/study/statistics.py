"""What is beyond chance when two arms are compared over seeds and test images; pure numpy."""

import numpy as np

RESAMPLES = 2000
NUMBERS = 2**22  # drawn at once


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for that of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def crossed_bootstrap(one: np.ndarray, other: np.ndarray, resamples: int = RESAMPLES, level: float = 0.95,
                      seed: int = 0) -> tuple[float, float, float]:
    """The mean of `one` minus that of `other`, and the percentile interval of it.

    one, other: bool or numbers [seeds, images], whether a network was right: paired by seed and image. Seeds and images are
    drawn apart from each other, the same ones for both arms (the pigeonhole bootstrap of Owen 2007, which errs to the wide
    side for what seeds and images do together). Images are drawn with replacement. Seeds are so few that drawing them would
    make too little of how they differ: they get weights 1/n + u_i / sqrt(n (n - 1)), u a centred normal vector divided by
    the root of a chi-square over its n - 1 degrees of freedom (a multiplier bootstrap). Where images do not matter that is
    Student's interval of the seeds' means, exact where these are normal, for two seeds as well. A single seed has weight 1:
    then the interval speaks of test images only.
    """
    gap = one.astype(np.float64) - other.astype(np.float64)
    seeds, images = gap.shape
    chance = np.random.default_rng(seed)
    # Images that differ in the same seeds in the same way are one kind: drawing images is drawing counts of kinds.
    kinds, counts = np.unique(gap, axis=1, return_counts=True)
    block = max(1, NUMBERS // len(counts))
    drawn = [chance.multinomial(images, counts / images, size=min(block, resamples - begin)) / images @ kinds.T
             for begin in range(0, resamples, block)]  # [resamples, seeds] together
    weight = np.ones((1, 1))
    if seeds > 1:
        pull = chance.standard_normal((resamples, seeds)) / np.sqrt(chance.chisquare(seeds - 1, (resamples, 1)))
        weight = 1 / seeds + (pull - pull.mean(1, keepdims=True)) / np.sqrt(seeds)
    means = (np.concatenate(drawn) * weight).sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(gap.mean()), float(low), float(high)
