"""The frozen teachers of a recipe in a loop, as pkd runs them (in blocks of rows, several steps at once), without students
or exchange.
"""

import torch
from problem import Problem

from pkd.objective import asked
from pkd.schedule import Router
from pkd.teacher import Question, TeacherHost
from pkd.views import Views


def main() -> None:
    problem = Problem()
    wanted = asked(problem.constants.kind, problem.pyramid)
    host = TeacherHost(0, {i: problem.teachers[i] for i in wanted},
                       Views(problem.data, problem.recipe.views, problem.recipe.seed), torch.device("cpu"),
                       problem.recipe.teachers.forward == "bf16", block=problem.recipe.answer_rows)
    router = Router(problem.pyramid, [wanted], problem.constants.own, block=problem.recipe.answer_rows)
    at_once, labels = problem.recipe.together, problem.data.labels.numpy()
    flats = [torch.zeros(router.largest(problem.schedule.batch), dtype=torch.float16) for _ in range(at_once)]

    def step(index: int) -> list[float]:
        if index == 1:
            print("warm", flush=True)
        if index % at_once == 0:
            every = [problem.schedule.global_batch(*divmod(index + more, problem.schedule.steps_per_epoch))
                     for more in range(at_once)]
            host.answer([Question(router.routes(labels[ids]), ids, flat) for ids, flat in zip(every, flats)], 0)
        return []
    problem.report(*problem.run(step, at_once))


if __name__ == "__main__":
    main()
