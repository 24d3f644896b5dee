"""The obvious data-parallel program: every rank holds all teachers, asks each once a micro batch; students under DDP."""

import datetime
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from problem import Problem
from torch.nn.parallel import DistributedDataParallel

from pkd.schedule import split


class Students(torch.nn.Module):
    def __init__(self, networks):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, images):
        return torch.stack([network(images).float() for network in self.networks])


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    problem, rank, ranks = Problem(), dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Students(problem.students), broadcast_buffers=False)
    optimizers, fixed = problem.optimizers(), problem.constants
    batch = problem.schedule.batch
    mine = split(batch, ranks)[rank]
    pull = torch.tensor(fixed.ensemble)

    def step(index: int) -> list[float]:
        images, labels = problem.batch(index)
        counts = [int(torch.isin(labels, classes).sum()) for classes in problem.classes]
        images, labels = images[mine], labels[mine]
        problem.same_draws(index, rank)
        logits = model(images)
        losses = torch.stack([F.cross_entropy(own, labels, reduction="sum") for own in logits]) / batch
        seen = torch.lerp(logits.detach(), logits, pull[:, None, None]).mean(0)
        ensemble = F.cross_entropy(seen, labels, reduction="sum") / batch
        for teacher, classes, weight, count in zip(problem.teachers, problem.classes, problem.weights, counts):
            rows = torch.isin(labels, classes).nonzero()[:, 0]
            if len(rows):
                with torch.inference_mode():
                    answer = teacher(images[rows]).float()
                soft = F.softmax(answer.clone() / fixed.temperature, 1)
                own = F.log_softmax(logits[:, rows][:, :, classes] / fixed.temperature, 2)
                kl = (torch.xlogy(soft, soft) - soft * own).sum((1, 2))
                losses = losses + weight * fixed.temperature**2 * kl / count
        for optimizer in optimizers:
            optimizer.zero_grad()
        # DDP averages over ranks; the mean of z_j has a gradient of 1 / students for each, as in a student's own term.
        ((losses.sum() + ensemble) * ranks).backward()
        for optimizer in optimizers:
            optimizer.step()
        total = losses.detach() + pull * ensemble.detach()
        if index < 3:  # only to be compared
            dist.all_reduce(total)
        return total.tolist()
    rate, losses = problem.run(step)
    if rank == 0:
        problem.report(rate, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
