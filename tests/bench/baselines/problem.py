"""What every baseline starts from: the same recipe, images, batches, frozen teachers and fresh students as pkd itself."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from pkd.data import load_data
from pkd.depthwise import use_tall_depthwise
from pkd.metrics import peak_memory
from pkd.network_file import derived_seed, fresh, read_teacher
from pkd.objective import constants
from pkd.pyramid import build_pyramid
from pkd.recipe_file import load_recipe
from pkd.schedule import Schedule
from pkd.teacher import as_it_answers, images_last


class Problem:
    """kernels: "eager" is torch as it comes; "ours" what pkd uses: teachers in the recipe's arithmetic, students channels
    last, and fp32 on a CPU or bf16 autocast on a GPU.
    """

    def __init__(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("recipe")
        parser.add_argument("--taught", type=Path, required=True)
        parser.add_argument("--steps", type=int, required=True)
        parser.add_argument("--threads", type=int, required=True)
        parser.add_argument("--kernels", choices=("eager", "ours"), required=True)
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        arguments = parser.parse_args()
        torch.set_num_threads(arguments.threads)
        self.steps, self.ours, self.device = arguments.steps, arguments.kernels == "ours", torch.device(arguments.device)
        self.recipe = recipe = load_recipe(arguments.recipe, [])
        self.data = load_data(recipe.data)
        self.pyramid = build_pyramid(recipe.pyramid, self.data.classes, recipe.seed)
        self.constants = constants(recipe, self.pyramid.levels)
        self.schedule = Schedule(self.data.splits["train"].numpy(), recipe.distill.batch, recipe.seed)
        self.students = [fresh(s.model, len(self.data.classes), self.data, recipe.seed, f"student {s.name}").train()
                         for s in recipe.students]
        self.teachers = [read_teacher(arguments.taught / "teachers", recipe, teacher, self.data, True)[0]
                         .eval().requires_grad_(False) for teacher in self.pyramid.teachers]
        self.classes = [torch.tensor(teacher.classes) for teacher in self.pyramid.teachers]
        self.weights = [self.constants.weights[teacher.level] for teacher in self.pyramid.teachers]
        if self.ours:
            self.students = [student.use_channels_last() for student in self.students]
            for student in self.students:
                use_tall_depthwise(student)
            last = images_last(recipe.teachers.forward_channels_last, self.device)
            self.teachers = [as_it_answers(teacher, recipe.teachers.forward == "bf16", last) for teacher in self.teachers]
        for network in (*self.students, *self.teachers):
            network.to(self.device)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 images and labels of a step's global batch."""
        epoch, within = divmod(step, self.schedule.steps_per_epoch)
        ids = torch.from_numpy(self.schedule.global_batch(epoch, within))
        return self.data.images[ids], self.data.labels[ids]

    def autocast(self) -> torch.autocast:
        """For the students' forward."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.ours and self.device.type == "cuda")

    def same_draws(self, step: int, rank: int = 0) -> None:
        """Before the students' forwards: they drop out what pkd's drop out, so that losses can be compared."""
        torch.manual_seed(derived_seed(self.recipe.seed, step, 0, rank))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(network.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay,
                                fused=self.ours) for network, s in zip(self.students, self.recipe.students)]

    def run(self, step: Callable[[int], Sequence], at_once: int = 1) -> tuple[float, list[list[float]]]:
        """Images per second without the first quarter of the steps, and every step's losses, one a student (numbers or
        tensors of one); of steps that work for `at_once` of them a whole number of rounds is timed.
        """
        losses, warm = [], -(-(self.steps // 4) // at_once) * at_once
        last = warm + max(1, (self.steps - warm) // at_once) * at_once
        for index in range(last):
            if index == warm:
                began = self.now()
            losses.append(step(index))
        rate = (last - warm) * self.schedule.batch / (self.now() - began)
        return rate, [list(map(float, own)) for own in losses]

    def now(self) -> float:
        """Seconds, once the device has done all that it was told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def report(self, rate: float, losses: list[list[float]]) -> None:
        print(json.dumps({"images_per_second": rate, "losses": losses[:3], "peak_memory_bytes": peak_memory(self.device)}))
