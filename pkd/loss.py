"""The pyramid distillation loss: one signature for every objective.

In: the students' logits, the labels, the teachers' logits by level, the counts of the whole optimizer step. Out: the loss
and its named terms. All of a level's teachers go through one vectorised KL; there is no loop over teachers or students.
Every sum is divided by *global* counts (over all ranks and micro batches), so adding the results of all micro batches of
all ranks gives the value of the optimizer step, however it was split.

Formulas: "paper" is Pyramid-Distill's (T^2-weighted KL of Hinton et al. 2015, one term a teacher),
"composed" by the chain rule over the pyramid. Logits are taken to fp32 before any softmax.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pkd.objective import Constants

MASKED = -1e30  # a logit that is not there: finite, so that 0 * it is 0 and no gradient becomes NaN


@dataclass(frozen=True)
class LevelTargets:
    """The answers of one level's teachers for one micro batch, rows ordered by teacher, then sample.

    Rows are padded to the level's widest teacher; `mask` says which columns count.
    """

    logits: torch.Tensor  # float [routes, width], each row the teacher's logits, up to a constant
    classes: torch.Tensor  # int64 [routes, width], the class of each column; padding is class 0
    mask: torch.Tensor  # bool [routes, width]
    sample: torch.Tensor  # int64 [routes], row of the micro batch
    share: torch.Tensor  # fp32 [routes], 1 / |R_t|: the teacher's routes in the whole optimizer step
    teachers: int  # teachers of this level


def pyramid_loss(
    logits: torch.Tensor, labels: torch.Tensor, levels: list[LevelTargets], batch: int, constants: Constants,
    everyone: torch.Tensor | None = None, own: list[int] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one micro batch and its terms.

    logits: [students, samples, classes], any float dtype; labels: int64 [samples]; levels: the asked levels from the top
    down, empty for `alone`; batch: samples of the whole optimizer step. A sample whose label is the number of classes has
    none: terms that need a label leave it out, and it counts in `batch` where teachers speak of it. Where `logits` and
    `constants` are of some of the students only: everyone: all students' logits, detached, for the ensemble term; own:
    which of them `logits` are.
    Returns the scalar to differentiate, in which student s has the gradient of its own L_s only, and fp32 [students]
    tensors, detached: "ce", "kl" (composed) or "kl_level0" ... (paper, top), "ensemble", and "loss", their sum L_s.
    """
    logits = logits.float()
    terms = {"ce": cross_entropy(logits, labels, constants.label_smoothing) / batch}
    if constants.kind == "composed":
        target = composed_target(levels, logits.shape[-1])
        terms["kl"] = constants.weights[0] * composed_kl(logits, target, constants.temperature) / batch
    else:
        for level, (targets, weight) in enumerate(zip(levels, constants.weights)):
            terms[f"kl_level{level}"] = weight * routed_kl(logits, targets, constants.temperature)
    total = sum(term.sum() for term in terms.values())
    if any(constants.ensemble) or everyone is not None:
        pull = logits.new_tensor(constants.ensemble)
        # Each student sees a_s of the ensemble's gradient, from one backward pass; the value is CE(mean) for any a.
        seen = torch.lerp(logits.detach(), logits, pull[:, None, None])
        if everyone is not None:
            seen = everyone.float().index_copy(0, torch.tensor(own, device=seen.device), seen)
        ensemble = F.cross_entropy(seen.mean(0), labels, reduction="sum", ignore_index=logits.shape[-1]) / batch
        total = total + ensemble
        terms["ensemble"] = pull * ensemble
    terms = {name: term.detach() for name, term in terms.items()}
    return total, {**terms, "loss": sum(terms.values())}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: tuple[float, ...]) -> torch.Tensor:
    """Cross-entropy of each student summed over samples with a label, fp32 [students]; smoothing: one a student (Szegedy
    2016).
    """
    log_probability, classes = F.log_softmax(logits, -1), logits.shape[-1]
    labelled = (labels < classes).float()
    of_label = log_probability.gather(-1, labels.clamp(max=classes - 1).expand(len(logits), -1)[..., None])[..., 0]
    hard = -(of_label * labelled).sum(1)
    if not any(smoothing):
        return hard
    weight = logits.new_tensor(smoothing)
    return (1 - weight) * hard - weight * (log_probability.mean(-1) * labelled).sum(1)


def routed_kl(logits: torch.Tensor, targets: LevelTargets, temperature: float) -> torch.Tensor:
    """T^2 * sum over teachers of the mean over their routes of KL(teacher || student restricted to its classes).

    fp32 [students]; 0 for a micro batch without routes.
    """
    rows = logits[:, targets.sample]  # [students, routes, classes]
    known = rows.gather(-1, targets.classes.expand(len(logits), -1, -1))  # [students, routes, width]
    student = F.log_softmax((known / temperature).masked_fill(~targets.mask, MASKED), -1)
    teacher = F.log_softmax((targets.logits.float() / temperature).masked_fill(~targets.mask, MASKED), -1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)  # [students, routes]
    return temperature**2 * (divergence * targets.share).sum(-1)


def composed_target(levels: list[LevelTargets], classes: int) -> torch.Tensor:
    """q, fp32 [samples, classes]: the mean over levels of log P_l(class), each level's by the chain rule at T = 1.

    log P_l(c) = log (mass that the top gives to the classes of c's specialist) + log softmax(specialist)(c).
    Every level asks all its teachers about all samples, and its classes are disjoint and complete.
    """
    top = F.log_softmax(levels[0].logits.float(), -1)
    total = top
    for level in levels[1:]:
        samples = len(top)
        shape = (level.teachers, samples, -1)
        mask = level.mask.view(shape)[:, 0]  # [teachers, width], the same for every sample
        column = level.classes.view(shape)[:, 0]
        within = F.log_softmax(level.logits.float().masked_fill(~level.mask, MASKED), -1).view(shape)
        mass = torch.logsumexp(top[:, column].masked_fill(~mask, MASKED), -1)  # [samples, teachers]
        joint = within + mass.T[..., None]  # [teachers, samples, width]
        answer = top.new_empty(samples, classes + 1)  # padding goes into one column more; a mask would stop a GPU
        answer[:, column.masked_fill(~mask, classes).flatten()] = joint.permute(1, 0, 2).flatten(1)
        total = total + answer[:, :classes]
    return total / len(levels)


def composed_kl(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * sum over samples of KL( softmax(q / T) || softmax(z / T) ), fp32 [students]."""
    teacher = F.log_softmax(target / temperature, -1)
    student = F.log_softmax(logits / temperature, -1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum((1, 2))
