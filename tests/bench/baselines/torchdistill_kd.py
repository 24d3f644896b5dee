"""torchdistill, one teacher and one student: its own distillation box, data loader and loop, as its examples use them."""

import logging

import torch
from problem import Problem
from torch.utils.data import SequentialSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box


def main() -> None:
    problem = Problem()
    logging.disable(logging.INFO)
    student, fixed = problem.recipe.students[0], problem.constants
    order = torch.cat([torch.from_numpy(problem.schedule.global_batch(*divmod(step, problem.schedule.steps_per_epoch)))
                       for step in range(problem.steps)])
    images, labels = problem.data.images[order], problem.data.labels[order]
    config = {
        "num_epochs": 1,
        "train_data_loader": {"dataset_id": "train", "sampler": {"class_or_func": SequentialSampler},
                              "kwargs": {"batch_size": problem.schedule.batch, "num_workers": 0, "drop_last": True}},
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": student.lr, "momentum": student.momentum,
                                               "weight_decay": student.weight_decay, "fused": True}},  # pkd's always is
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {
            "criterion": {"key": "KDLoss", "kwargs": {
                "student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".",
                "teacher_module_io": "output", "temperature": fixed.temperature, "alpha": 1.0,
                "beta": fixed.weights[0], "reduction": "batchmean"}}, "weight": 1.0}}}},
    }
    box = get_distillation_box(problem.teachers[0], problem.students[0], {"train": TensorDataset(images, labels)}, config,
                               torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    batches = iter(box.train_data_loader)

    def step(_: int) -> list[float]:
        sample, targets, supplement = next(batches)
        box.pre_forward_process()
        loss = box.forward_process(sample, targets, supplement)
        box.post_forward_process(loss=loss)
        return [loss.item()]
    problem.report(*problem.run(step))


if __name__ == "__main__":
    main()
