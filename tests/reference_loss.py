"""The pyramid losses in float64, written from the formulas of the design alone: plain loops, one student at a time.

Slow and obvious on purpose, and without a line of pkd.loss in it, so that an error there cannot hide here.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Asked:
    """One teacher: its level, its classes in the order of its logits, and its answer to each sample of its routes."""

    level: int
    classes: tuple[int, ...]
    answers: dict[int, torch.Tensor]  # sample -> float64 [classes]


def reference(
    logits: torch.Tensor, labels: list[int], teachers: list[Asked], kind: str, temperature: float,
    weights: tuple[float, ...], ensemble: tuple[float, ...], smoothing: tuple[float, ...], per_batch: bool = False,
) -> tuple[list[float], torch.Tensor]:
    """(L_s of every student, its gradient with respect to student s's own logits [students, samples, classes])."""
    losses, gradients = [], []
    for s in range(len(logits)):
        students = [z.double().clone() for z in logits]
        students[s].requires_grad_()
        loss = labelled(students[s], labels, smoothing[s])
        if kind == "composed":
            loss = loss + weights[0] * composed(students[s], teachers, temperature)
        for teacher in teachers if kind in ("paper", "top") else ():
            loss = loss + weights[teacher.level] * asked_alone(students[s], teacher, temperature, per_batch)
        mean = sum(students) / len(students)
        loss = loss + ensemble[s] * labelled(mean, labels, 0.0)
        loss.backward()
        losses.append(loss.item())
        gradients.append(students[s].grad)
    return losses, torch.stack(gradients)


def labelled(z: torch.Tensor, labels: list[int], smoothing: float) -> torch.Tensor:
    """Cross-entropy over the number of samples; the target is 1 - smoothing on the label and smoothing spread evenly over
    all classes. A sample whose label is the number of classes has none.
    """
    total = 0 * z.sum()  # of no label at all, too, something that can be differentiated
    for n, label in enumerate(labels):
        if label == z.shape[-1]:
            continue
        log_probability = torch.log_softmax(z[n], 0)
        total = total - (1 - smoothing) * log_probability[label] - smoothing * log_probability.mean()
    return total / len(labels)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def asked_alone(z: torch.Tensor, teacher: Asked, temperature: float, per_batch: bool) -> torch.Tensor:
    """T^2 / |R_t| (per_batch: / |B|) * sum over the teacher's routes of KL(teacher || student on the teacher's classes)."""
    total = torch.zeros((), dtype=torch.float64)
    for n, u in teacher.answers.items():
        known = torch.stack([z[n, c] for c in teacher.classes])
        total = total + divergence(torch.log_softmax(u / temperature, 0), torch.log_softmax(known / temperature, 0))
    return temperature**2 / (len(z) if per_batch else max(1, len(teacher.answers))) * total


def composed(z: torch.Tensor, teachers: list[Asked], temperature: float) -> torch.Tensor:
    """T^2 * mean over samples of KL(softmax(q / T) || softmax(z / T)), q the mean over levels of log p_l."""
    top, levels = teachers[0], 1 + max(teacher.level for teacher in teachers)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(z)):
        log_p0 = torch.empty(z.shape[1], dtype=torch.float64)
        log_p0[list(top.classes)] = torch.log_softmax(top.answers[n], 0)
        q = log_p0 / levels
        for teacher in teachers[1:]:
            mass = torch.logsumexp(log_p0[list(teacher.classes)], 0)
            within = torch.log_softmax(teacher.answers[n], 0)
            for k, c in enumerate(teacher.classes):
                q[c] = q[c] + (mass + within[k]) / levels
        total = total + divergence(torch.log_softmax(q / temperature, 0), torch.log_softmax(z[n] / temperature, 0))
    return temperature**2 * total / len(z)
