"""The published program, mended so that it runs: one process, and for each student every teacher's forward again.

Teachers without gradients, each asked about the samples of its own classes only, exactly as many rows as there are.
"""

import torch
import torch.nn.functional as F
from problem import Problem


def main() -> None:
    problem = Problem()
    optimizers, fixed = problem.optimizers(), problem.constants

    def step(index: int) -> list[float]:
        images, labels = problem.batch(index)
        problem.same_draws(index)
        logits = [student(images).float() for student in problem.students]
        losses = []
        for s, optimizer in enumerate(optimizers):
            mean = sum(z if j == s else z.detach() for j, z in enumerate(logits)) / len(logits)
            loss = F.cross_entropy(logits[s], labels) + fixed.ensemble[s] * F.cross_entropy(mean, labels)
            for teacher, classes, weight in zip(problem.teachers, problem.classes, problem.weights):
                mine = torch.isin(labels, classes).nonzero()[:, 0]
                if len(mine):
                    with torch.inference_mode():
                        answer = teacher(images[mine]).float()
                    soft = F.softmax(answer.clone() / fixed.temperature, 1)
                    own = F.log_softmax(logits[s][mine][:, classes] / fixed.temperature, 1)
                    loss = loss + weight * fixed.temperature**2 * F.kl_div(own, soft, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
        return losses
    problem.report(*problem.run(step))


if __name__ == "__main__":
    main()
