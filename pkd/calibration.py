"""How long a recipe's parts take on these ranks: measured once, all ranks of a node at the same time, and cached.

FLOPs mispredict networks whose layers wait for memory, depthwise ones above all. On a CPU as many ranks measure as its cores
hold; the others wait, so that the seconds are those of a rank that has its cores to itself.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from pkd.ballot import Ballot
from pkd.cost import network_cost
from pkd.ds_config import load_ds_config
from pkd.engine import Engine
from pkd.errors import LocalError, PassingError, UserError
from pkd.figures import Keys, cached, keep, surroundings
from pkd.hardware import cores_per_node, memory_per_rank, nodes
from pkd.job import Job
from pkd.loss import pyramid_loss
from pkd.network_file import fresh
from pkd.objective import asked, constants
from pkd.optimizer import parameter_group, state_keys
from pkd.placement import check_batch
from pkd.rank_map import USABLE
from pkd.recipe import Model
from pkd.recipe_file import digest
from pkd.schedule import BLOCK, Router, Schedule
from pkd.targets import Unpacker
from pkd.teacher import TeacherHost
from pkd.timings import Timings
from pkd.views import Views

SECONDS, TIMES = 0.3, 5  # each part is timed so long and so often at least
STEPS = 12  # students' steps of each kind: from them comes how much one differs from the next
LARGE = 2**22  # bytes of the large message


def calibrated(job: Job, schedule: Schedule, views: Views, ballot: Ballot, online: bool,
               measure: bool) -> Callable[[Timings], Timings]:
    """Puts measured seconds in the place of estimated ones; a collective over all ranks. online: whether teachers are asked.

    They are from the cache as far as they are in it. Estimates stay for students that do not fit one rank alone, which
    cannot be timed before they are placed; and everywhere if something is not in the cache and is not to be measured now.
    """
    world = job.world
    plan = world.first("calibration: plan", lambda: _plan(job, online))
    keys = Keys(job.recipe, job.pyramid, job.data, plan["where"], world.size, online)
    if plan["missing"] and not measure:
        return lambda estimates: estimates
    own = {digest(key): key for key in keys.all()}
    if not own.keys() >= set(plan["missing"]):
        raise LocalError(f"rank {world.rank} has another kind of device or another torch than rank 0, so that they time "
                         "other parts: give all nodes the same, or say who is where by placement.kind and student_ranks")
    missing = [own[name] for name in plan["missing"]]
    mine = {}
    if missing:
        job.console.say(f"timing {len(missing)} part(s) of the recipe on these ranks, once")
        meter = _Meter(job, keys, schedule, views, ballot, plan["ranks"])
        for key in missing:
            if key["part"] == "links" or world.rank in plan["ranks"]:
                job.beat(f"timing {key['part']}", group="the other ranks")
                _together(job, f"calibration: {digest(key)}", world.size if key["part"] == "links" else len(plan["ranks"]))
                try:
                    mine[digest(key)] = meter.measure(key)
                except torch.OutOfMemoryError:
                    job.world.leave_island()  # of the students, if it was their step
                    gc.collect()
                    torch.cuda.empty_cache()
                    job.console.say(f"not timed but estimated, for lack of memory: {key['part']}")
        job.beat("timed", group="the other ranks")
    found = world.gather("calibration: figures", mine)

    def decide():
        figures = cached(keys.all())
        measured = [key for key in missing if any(digest(key) in one for one in found)]
        for name in map(digest, measured):
            figures[name] = [statistics.median(values) for values in zip(*(one[name] for one in found if name in one))]
        try:
            keep(measured, figures)
        except (UserError, PassingError) as error:
            job.console.say(f"what was timed is not kept: {error}")
        return figures
    return partial(keys.timings, world.first("calibration: figures of all", decide))


def _plan(job: Job, online: bool) -> dict:
    """Which ranks measure, and what; for rank 0. Of each node as many ranks as its cores hold."""
    check_batch(job.recipe.distill.batch, 1, job.recipe.placement.accumulation)
    where_of, cores = nodes(job.hardware), cores_per_node(job.hardware)
    ranks, threads = [], job.recipe.threads
    taken = [0] * len(cores)
    for rank, node in enumerate(where_of):
        if taken[node] == 0 or (taken[node] + 1) * threads <= cores[node]:
            taken[node] += 1
            ranks.append(rank)
    where = surroundings(sorted({one.device for one in job.hardware}), max(taken), len(ranks))
    every = Keys(job.recipe, job.pyramid, job.data, where, job.world.size, online).all()
    there = cached(every)
    missing = [digest(key) for key in every if digest(key) not in there and _fits(job, key)]
    return {"where": where, "ranks": ranks, "missing": missing}


def _fits(job: Job, key: dict) -> bool:
    """Whether a rank can hold what is to be timed, as far as its weights, gradients and states tell: the rest is estimated,
    and lies in shards or under ZeRO later.
    """
    data, room = job.data, USABLE * min(memory_per_rank(job.hardware, job.recipe.placement.memory_gib))
    if key["part"] == "forward":
        model = Model.model_validate(key["model"])
        return 4 * network_cost(model, key["classes"], data.channels, data.size).parameters < room
    if key["part"] not in ("train", "sync"):
        return True
    # Of each number its weight, the copy that is validated, its gradient and its states.
    return sum(network_cost(student.model, len(data.classes), data.channels, data.size).parameters
               * 4 * (3 + len(state_keys(parameter_group(student.name, [], student))))
               for student in job.recipe.students) < room


def _together(job: Job, name: str, count: int) -> None:
    """Wait until so many ranks are here."""
    job.world.store.add(name, 1)
    while job.world.store.add(name, 0) < count:
        time.sleep(0.001)


class _Meter:
    """Measures one part on this rank, the way the run itself does it."""

    def __init__(self, job: Job, keys: Keys, schedule: Schedule, views: Views, ballot: Ballot, ranks: list[int]):
        self.ranks = ranks  # that measure
        self.job, self.keys, self.schedule, self.views, self.ballot = job, keys, schedule, views, ballot
        self.device = job.world.device

    def measure(self, key: dict) -> list[float]:
        return getattr(self, f"_{key['part']}")(key)

    def _view(self, key: dict) -> list[float]:
        batches = iter(range(10**9))

        def batch():  # other images each time: what has just been decoded is quicker
            self.views.batch(self._ids(BLOCK, next(batches)), 0)
        return [self._time(batch) / BLOCK]

    def _links(self, key: dict) -> list[float]:
        out = []
        for elements in (2, LARGE // 4):
            message, group = torch.zeros(elements), self.ballot.group
            group.allreduce([message]).wait()
            began = time.perf_counter()
            for _ in range(TIMES):  # not for so long: all ranks must agree how often
                group.allreduce([message]).wait()
            out.append((time.perf_counter() - began) / TIMES)
        return [*out, float(LARGE)]

    def _forward(self, key: dict) -> list[float]:
        recipe = self.job.recipe
        teacher = next(t for t in self.job.pyramid.teachers if self.keys.forward(t) == key)
        network = fresh(teacher.model.model_copy(update={"weights": None}), len(teacher.classes), self.job.data, 0, "timed")
        host = TeacherHost(0, {0: network}, self.views, self.device, recipe.teachers.forward == "bf16",
                           block=recipe.answer_rows, channels_last=recipe.teachers.forward_channels_last)
        images = self.views.plain(self._ids(recipe.answer_rows))
        return [self._time(lambda: host.forward(0, images))]

    def _train(self, key: dict) -> list[float]:
        alone, sizes, students = [self.job.world.rank], key["rows"], key["students"]
        few, many = self._steps("all students", alone, sizes, range(len(students)))
        median, each = statistics.median(many), {}
        for index, student in enumerate(students) if len(students) > 1 else ():
            kind = digest({**student, "name": ""})  # of those that are alike one is enough
            each[kind] = each.get(kind) or statistics.median(self._steps(student["name"], alone, sizes[1:], [index])[0])
        costs = [each[digest({**student, "name": ""})] for student in students] if each else [1.0]
        return [statistics.median(few), median, statistics.stdev(many) / median, self._time(self._routes),
                *(cost / sum(costs) for cost in costs)]

    def _sync(self, key: dict) -> list[float]:  # one soon after the other: a machine's speed drifts
        students = range(len(key["students"]))
        return [statistics.median(self._steps(name, island, key["rows"][:1], students)[0])
                for name, island in (("one rank", [self.job.world.rank]), ("several ranks", self.ranks))]

    def _steps(self, name: str, island: list[int], sizes: list[int], own: Sequence[int]) -> list[list[float]]:
        """Seconds of each of some steps of students `own` on an island of ranks, for micro batches of these sizes. name: of
        this measurement alone.
        """
        job, recipe, device = self.job, self.job.recipe, self.device
        fixed, students = constants(recipe, job.pyramid.levels).of(own), [recipe.students[index] for index in own]
        unpacker = Unpacker(job.pyramid, asked(recipe.objective.kind, job.pyramid))
        labels, routes = self._routes()
        flat = torch.zeros(routes.size, dtype=torch.float16)
        job.world.join_island(f"calibration of {name}: ranks {island}", island)
        networks = {s.name: fresh(s.model.model_copy(update={"weights": None}), len(job.data.classes), job.data, 0, s.name)
                    for s in students}
        engine = Engine(networks, students, load_ds_config(recipe.deepspeed.students), 1, device,
                        recipe.channels_last, recipe.distill.sync_batch_norm, recipe.distill.compile)
        engine.set_rates([1e-9] * len(networks))  # they stay as they are: infinities have times of their own

        def step(rows: int) -> None:
            images = self.views.plain(self._ids(rows)).to(device)
            levels = unpacker.unpack(routes, flat, slice(0, rows), device)
            loss, _ = pyramid_loss(engine.forward(images), labels[:rows].to(device), levels, len(labels), fixed)
            engine.backward(loss)
        found = []
        for rows in sizes:
            self._once(lambda rows=rows: step(rows))
            found.append([self._once(lambda rows=rows: step(rows)) for _ in range(STEPS)])  # the same on all ranks
        engine.close()
        job.world.leave_island()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return found

    def _routes(self):
        """Labels and routes of a global batch."""
        recipe, pyramid = self.job.recipe, self.job.pyramid
        own = constants(recipe, pyramid.levels).own
        labels = self.job.data.labels[self._ids(self.schedule.batch)]
        return labels, Router(pyramid, [asked(recipe.objective.kind, pyramid)], own).routes(labels.numpy())

    def _ids(self, count: int, page: int = 0) -> torch.Tensor:
        """Training samples by number; from the beginning again where there are not so many."""
        samples = self.schedule.samples
        return torch.from_numpy(samples[(page * count + torch.arange(count).numpy()) % len(samples)])

    def _time(self, action: Callable[[], object]) -> float:
        """Median seconds."""
        self._once(action)  # kernels are chosen and buffers allocated
        seconds, end = [], time.perf_counter() + SECONDS
        while len(seconds) < TIMES or time.perf_counter() < end:
            seconds.append(self._once(action))
        return statistics.median(seconds)

    def _once(self, action: Callable[[], object]) -> float:
        began = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.job.watchdog.works()
        return time.perf_counter() - began
