"""The published program, mended so that it runs: one process, and for each student every teacher's forward again.

Teachers without gradients, each asked about the samples of its own classes only, exactly as many rows as there are.
"""

import torch
import torch.nn.functional as F
from problem import Problem

from pkd.transfer import to_device


def main() -> None:
    problem = Problem()
    optimizers, fixed, device = problem.optimizers(), problem.constants, problem.device
    on_device = [classes.to(device) for classes in problem.classes]

    def step(index: int) -> list[torch.Tensor]:
        images, labels = problem.batch(index)
        routes = [to_device(torch.isin(labels, classes).nonzero()[:, 0], device) for classes in problem.classes]
        images, labels = to_device(images, device), to_device(labels, device)
        problem.same_draws(index)
        with problem.autocast():
            logits = [student(images) for student in problem.students]
        logits = [own.float() for own in logits]
        losses = []
        for s, optimizer in enumerate(optimizers):
            mean = sum(z if j == s else z.detach() for j, z in enumerate(logits)) / len(logits)
            loss = F.cross_entropy(logits[s], labels) + fixed.ensemble[s] * F.cross_entropy(mean, labels)
            for teacher, classes, weight, mine in zip(problem.teachers, on_device, problem.weights, routes):
                if len(mine):
                    with torch.inference_mode():
                        answer = teacher(images[mine]).float()
                    soft = F.softmax(answer.clone() / fixed.temperature, 1)
                    own = F.log_softmax(logits[s][mine][:, classes] / fixed.temperature, 1)
                    loss = loss + weight * fixed.temperature**2 * F.kl_div(own, soft, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
        for optimizer in optimizers:
            optimizer.step()
        return losses
    problem.report(*problem.run(step))


if __name__ == "__main__":
    main()
