"""The seconds of a recipe's parts, measured or estimated, and the workload that they make; pure."""

from dataclasses import dataclass, field, replace

import numpy as np

from pkd.cost import network_cost
from pkd.data import DataSet
from pkd.devices import BACKWARD, Device
from pkd.ds_config import arithmetic, load_ds_config, precision, stage
from pkd.images import FileImages
from pkd.objective import asked, constants
from pkd.optimizer import parameter_group, state_keys
from pkd.pyramid import Pyramid
from pkd.recipe import Recipe
from pkd.schedule import BLOCK
from pkd.workload import Links, StudentWork, TeacherWork, Workload


@dataclass(frozen=True)
class Timings:
    """Seconds on one rank with all cores of its node at work."""

    blocks: dict[str, float]  # teacher -> a forward of one block of rows
    micro: float  # a student micro batch, whatever its rows
    row: float  # each of its rows
    parts: tuple[float, ...]  # a student's part of these two
    view: float  # to read, decode and augment one image
    step: float = 1e-3  # every rank's bookkeeping in a step
    links: Links = field(default_factory=Links)
    sync: tuple[int, float] | None = None  # so many ranks' gradients were all-reduced in so many seconds
    jitter: float = 0.0  # standard deviation of a students' step, as a share of it
    source: str = "estimated"


def estimated(recipe: Recipe, pyramid: Pyramid, data: DataSet, device: Device, view: float = 0.0,
              source: str = "estimated") -> Timings:
    """From data sheets; view: seconds an image, which no data sheet tells."""
    bf16 = recipe.teachers.forward == "bf16"
    blocks = {teacher.name: device.forward(network_cost(teacher.model, len(teacher.classes), data.channels, data.size),
                                           recipe.answer_rows, bf16)
              for teacher in pyramid.teachers}
    costs, half = _students(recipe, data), arithmetic(load_ds_config(recipe.deepspeed.students)) != "fp32"
    few, each = ([(1 + BACKWARD) * device.forward(cost, rows, half) for cost in costs] for rows in (8, BLOCK))
    row = (sum(each) - sum(few)) / (BLOCK - 8)
    links = Links(gradients=device.link, gradients_latency=device.hop)
    return Timings(blocks, max(0.0, sum(few) - 8 * row), row, tuple(one / sum(each) for one in each), view, links=links,
                   source=source)


def workload(recipe: Recipe, pyramid: Pyramid, data: DataSet, timings: Timings, device: Device) -> Workload:
    """Of ranks on such a device. Students in one group, unless the recipe says."""
    config, fixed = load_ds_config(recipe.deepspeed.students), constants(recipe, pyramid.levels)
    labels, batch = data.labels[data.students_see].numpy(), recipe.distill.batch
    counts = np.bincount(labels, minlength=len(data.classes) + 1)
    about = pyramid.asked_about(fixed.own)
    teachers, largest, weight = {}, 0, 2 if recipe.teachers.forward == "bf16" else 4
    block, at_once = recipe.answer_rows, recipe.together
    for index in asked(recipe.objective.kind, pyramid):
        teacher = pyramid.teachers[index]
        cost = network_cost(teacher.model, len(teacher.classes), data.channels, data.size)
        share = counts[about[index]].sum() / len(labels)
        teachers[teacher.name] = TeacherWork(timings.blocks[teacher.name], share * batch,
                                             mean_blocks(batch * at_once, share, block) / at_once,
                                             weight * cost.parameters, len(teacher.classes))
        largest = max(largest, *(layer.read + layer.written for layer in cost.layers))
    costs, element = _students(recipe, data), 4 if precision(config) == "fp32" else 2
    students = tuple(
        StudentWork(timings.micro * part, timings.row * part, cost.parameters,
                    len(state_keys(parameter_group(student.name, [], student))), element * cost.activations)
        for student, cost, part in zip(recipe.students, costs, timings.parts, strict=True))
    crossing = 4.0 * len(students) * len(data.classes) if any(fixed.ensemble) else 0.0
    # On a CPU the memory of ranks is also the host's: of the images that each decodes once, of the best weights so far.
    on_host, decoded = not device.memory, data.images.bytes
    if isinstance(data.images, FileImages) and decoded > 2**30 * recipe.data.cache_gib:
        decoded = 0
    runtime = device.runtime + (decoded if on_host else 0)
    links = timings.links
    if timings.sync:
        links = _ring(links, *timings.sync, sum(cost.parameters for cost in costs) * element)
    return Workload(
        teachers, students, batch, recipe.placement.student_groups or 1, crossing, timings.jitter, timings.view,
        timings.step, recipe.window, recipe.together, stage(config), element, teacher_memory=4 * block * largest,
        image=data.channels * data.size[0] * data.size[1], links=links, runtime=runtime, source=timings.source,
        sent=recipe.teacher_views == "sent", exchange=recipe.exchange, block=block, copies=2 if on_host else 1)


def _ring(links: Links, ranks: int, seconds: float, size: float) -> Links:
    """Links whose ring() of `size` bytes takes so many seconds."""
    hop = max(seconds, 1e-6) / 2 / (ranks - 1)
    latency = min(links.gradients_latency, hop / 2)
    return replace(links, gradients=size / ranks / (hop - latency), gradients_latency=latency)


def mean_blocks(batch: int, share: float, block: int = BLOCK) -> float:
    """Mean number of blocks of rows that a teacher's rows fill if each of `batch` rows is asked with probability `share`."""
    if share <= 0 or share >= 1:
        return float(-(-batch // block)) if share else 0.0
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, batch + 1)))])  # of factorials
    rows = np.arange(batch + 1)
    probability = np.exp(logs[-1] - logs - logs[::-1] + rows * np.log(share) + (batch - rows) * np.log1p(-share))
    return float(probability @ -(-rows // block))


def _students(recipe: Recipe, data: DataSet) -> list:
    return [network_cost(student.model, len(data.classes), data.channels, data.size) for student in recipe.students]
