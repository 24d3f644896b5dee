"""pkd.loss against tests/reference_loss.py, however a batch is split, and what must not matter to it."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import Asked, reference

from pkd.loss import LevelTargets, composed_target, pyramid_loss
from pkd.objective import Constants

KINDS = ("paper own", "paper all", "paper batch", "composed", "top", "alone")
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Case:
    """A global batch: what the students and the teachers said about it, and the objective."""

    logits: torch.Tensor  # [students, samples, classes]
    labels: list[int]
    levels: list[list[tuple[int, ...]]]  # classes of each teacher of each level
    routes: list[list[tuple[int, int]]]  # of each level: (teacher, sample), by teacher, then sample
    answers: list[list[torch.Tensor]]  # of each level: a row of logits a route
    constants: Constants


def level_targets(
    teachers: list[tuple[int, ...]], routes: list[tuple[int, int]], answers: list[torch.Tensor], count: list[int]
) -> LevelTargets:
    """LevelTargets of plain lists; padding holds numbers that would be seen if the mask were not."""
    width = max(len(classes) for classes in teachers)
    dtype = answers[0].dtype if answers else torch.float32
    logits = torch.full((len(routes), width), 7.0, dtype=dtype)
    classes = torch.zeros(len(routes), width, dtype=torch.int64)
    mask = torch.zeros(len(routes), width, dtype=torch.bool)
    for i, ((teacher, _), row) in enumerate(zip(routes, answers)):
        logits[i, :len(row)] = row
        classes[i, :len(row)] = torch.tensor(teachers[teacher])
        mask[i, :len(row)] = True
    sample = torch.tensor([n for _, n in routes], dtype=torch.int64)
    share = torch.tensor([1 / count[t] for t, _ in routes], dtype=torch.float32)
    return LevelTargets(logits, classes, mask, sample, share, len(teachers))


def groups_of(rng: np.random.Generator, classes: list[int]) -> list[tuple[int, ...]]:
    """`classes` in 1 to 3 disjoint groups of at least 2."""
    parts = int(rng.integers(1, min(3, len(classes) // 2) + 1))
    return [tuple(sorted(map(int, group))) for group in np.array_split(rng.permutation(classes), parts)]


def make_case(seed: int, kind: str, samples: int | None = None, scale: float = 3.0) -> Case:
    """A random pyramid (overlapping in the middle and incomplete below for `paper`) with a random batch."""
    rng = np.random.default_rng(seed)
    classes, students = int(rng.integers(4, 10)), int(rng.integers(1, 5))
    samples = samples or int(rng.integers(1, 20))
    everything = list(range(classes))
    levels = [[tuple(everything)]]
    for below in range(int(rng.integers(0, 3)) if kind != "top" else 0):
        if kind == "composed":
            levels.append(groups_of(rng, everything))
        elif below == 0:
            sizes = rng.integers(2, classes, size=rng.integers(1, 4))
            levels.append([tuple(sorted(map(int, rng.choice(classes, size, replace=False)))) for size in sizes])
        else:
            levels.append(groups_of(rng, everything[:-1]))
    levels = [] if kind == "alone" else levels
    labels = [int(c) for c in rng.choice(rng.integers(0, classes + 1, size=3), samples)]  # many classes are absent
    own = kind in ("paper own", "paper batch")
    routes = [[(t, n) for t, known in enumerate(level) for n in range(samples)
               if not own or labels[n] in known or len(known) == classes] for level in levels]
    dtype = (torch.float16, torch.float32)[rng.integers(2)]
    answers = [[torch.tensor(scale * rng.standard_normal(len(level[t]))).to(dtype) for t, _ in asked]
               for level, asked in zip(levels, routes)]
    precision = (torch.bfloat16, torch.float32)[rng.integers(2)]
    logits = torch.tensor(scale * rng.standard_normal((students, samples, classes))).to(precision)
    kind, per_batch = kind.split()[0], kind == "paper batch"
    wanted = {"paper": len(levels), "alone": 0}.get(kind, 1)
    some = rng.random() < 0.5
    constants = Constants(kind, float(rng.uniform(1, 20)), tuple(rng.uniform(0, 2, wanted)),
                          tuple(rng.uniform(0, 1, students) * some), tuple(rng.uniform(0, 0.3, students)), own, per_batch)
    return Case(logits, labels, levels, routes, answers, constants)


def computed(case: Case, start: int = 0, stop: int | None = None,
             **groups) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """pkd's terms and gradient of samples [start, stop) as one micro batch of the case's whole batch."""
    stop = len(case.labels) if stop is None else stop
    levels = []
    for teachers, routes, answers in zip(case.levels, case.routes, case.answers):
        count = [len(case.labels) if case.constants.per_batch else sum(t == teacher for t, _ in routes)
                 for teacher in range(len(teachers))]
        mine = [i for i, (_, n) in enumerate(routes) if start <= n < stop]
        local = [(routes[i][0], routes[i][1] - start) for i in mine]
        levels.append(level_targets(teachers, local, [answers[i] for i in mine], count))
    logits = case.logits[:, start:stop].clone().requires_grad_()
    loss, terms = pyramid_loss(logits, torch.tensor(case.labels[start:stop]), levels, len(case.labels), case.constants,
                               **groups)
    loss.backward()
    return terms, logits.grad


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's losses [students] and gradient."""
    teachers = []
    for number, (level, routes, answers) in enumerate(zip(case.levels, case.routes, case.answers)):
        for index, classes in enumerate(level):
            rows = {n: row.double() for (t, n), row in zip(routes, answers) if t == index}
            teachers.append(Asked(number, classes, rows))
    c = case.constants
    losses, gradient = reference(case.logits, case.labels, teachers, c.kind, c.temperature, c.weights, c.ensemble,
                                 c.label_smoothing, c.per_batch)
    return torch.tensor(losses, dtype=torch.float64), gradient


def assert_same_loss(case: Case, losses: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to fp32's resolution of a KL, which T^2 and the weights of all teachers multiply."""
    teachers = 1 + sum(map(len, case.levels))
    atol = 1e-6 * case.constants.temperature**2 * teachers + 1e-5
    torch.testing.assert_close(losses.double(), wanted.double(), rtol=1e-5, atol=atol)


def assert_same_gradient(case: Case, gradient: torch.Tensor, wanted: torch.Tensor) -> None:
    rtol = 2**-8 if case.logits.dtype == torch.bfloat16 else 1e-5  # autograd returns the dtype of the logits
    atol = 1e-6 * case.constants.temperature * (1 + sum(map(len, case.levels)))
    torch.testing.assert_close(gradient.double(), wanted.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
@quick
def test_every_students_loss_and_gradient_are_those_of_the_formulas(kind, seed):
    case = make_case(seed, kind)
    losses, gradient = expected(case)
    terms, found = computed(case)
    assert_same_loss(case, terms["loss"], losses)
    assert_same_gradient(case, found, gradient)


@given(seed=SEEDS, peers=st.integers(1, 5), samples=st.integers(1, 20), classes=st.integers(2, 12))
@quick
def test_peers_that_know_every_class_compose_to_the_mean_of_their_log_probabilities(seed, peers, samples, classes):
    said = torch.tensor(5 * np.random.default_rng(seed).standard_normal((peers, samples, classes))).half()
    routes, everything = [(0, n) for n in range(samples)], [tuple(range(classes))]
    levels = [level_targets(everything, routes, list(rows), [samples]) for rows in said]
    mean = said.float().log_softmax(-1).mean(0)
    torch.testing.assert_close(composed_target(levels, classes), mean, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, ranks=st.integers(1, 5), accumulation=st.integers(1, 3), data=st.data())
@settings(max_examples=25, deadline=None)
def test_uneven_micro_batches_add_up_to_the_whole_batch(kind, seed, ranks, accumulation, data):
    case = make_case(seed, kind, samples=data.draw(st.integers(ranks * accumulation, 30)))
    samples, pieces = len(case.labels), ranks * accumulation
    inner = st.lists(st.integers(1, samples - 1), min_size=pieces - 1, max_size=pieces - 1, unique=True)
    cuts = [0, *(sorted(data.draw(inner)) if pieces > 1 else ()), samples]
    parts = [computed(case, start, stop) for start, stop in pairwise(cuts)]
    terms, gradient = computed(case)
    assert all(set(part) == set(terms) for part, _ in parts)
    for name, whole in terms.items():
        assert_same_loss(case, sum(part[name] for part, _ in parts), whole)
    assert_same_gradient(case, torch.cat([part for _, part in parts], dim=1), gradient)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, data=st.data())
@quick
def test_students_in_groups_have_their_terms_and_gradients_among_all(kind, seed, data):
    """A group that knows the others' logits, without gradient, computes for its own students what all together do."""
    case = make_case(seed, kind)
    terms, gradient = computed(case)
    every = range(len(case.logits))
    own = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True).map(sorted))
    found, part = computed(replace(case, logits=case.logits[own], constants=case.constants.of(own)), everyone=case.logits,
                           own=own)
    assert set(terms) | {"ensemble"} == set(found)  # also where the ensemble pulls none of the group's students
    for name, whole in terms.items():
        assert_same_loss(case, found[name], whole[own])
    assert_same_gradient(case, part, gradient[own])


@pytest.mark.parametrize("kind", ("paper own", "paper all", "composed", "top"))
@given(seed=SEEDS)
@quick
def test_a_constant_added_to_a_teachers_row_changes_nothing(kind, seed):
    case = make_case(seed, kind)
    rng = np.random.default_rng(seed)
    exact = [[row.float() for row in level] for level in case.answers]  # fp16 would round the sums
    moved = [[row + float(rng.uniform(-30, 30)) for row in level] for level in exact]
    terms, gradient = computed(replace(case, answers=exact))
    moved_terms, moved_gradient = computed(replace(case, answers=moved))
    atol = 2e-5 * case.constants.temperature**2
    torch.testing.assert_close(moved_terms["loss"], terms["loss"], rtol=1e-4, atol=atol)
    torch.testing.assert_close(moved_gradient, gradient, rtol=2**-7, atol=atol)


@pytest.mark.parametrize("kind", ("paper own", "paper all", "top"))
@given(seed=SEEDS)
@quick
def test_a_teacher_that_says_what_the_student_says_pulls_nowhere(kind, seed):
    case = make_case(seed, kind)
    case = replace(case, logits=case.logits[:1].float(), constants=replace(
        case.constants, ensemble=(0.0,), label_smoothing=(0.0,)))
    agreeing = [[case.logits[0, n, list(level[t])] + 2 for t, n in routes]
                for level, routes in zip(case.levels, case.routes)]
    terms, gradient = computed(replace(case, answers=agreeing))
    alone = replace(case, levels=[], routes=[], answers=[],
                    constants=replace(case.constants, kind="alone", weights=()))
    for name in terms:
        if name.startswith("kl"):
            assert_same_loss(case, terms[name], torch.zeros(1))
    assert_same_gradient(case, gradient, computed(alone)[1])


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
@quick
def test_extreme_logits_give_finite_losses_and_gradients(kind, seed):
    case = make_case(seed, kind)
    extreme = replace(case, logits=1e4 * case.logits.sign(), answers=[
        [1e4 * row.sign() for row in level] for level in case.answers])
    terms, gradient = computed(extreme)
    assert all(term.isfinite().all() for term in terms.values())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
@quick
def test_the_terms_are_detached_fp32_numbers_of_each_student_and_sum_to_its_loss(kind, seed):
    case = make_case(seed, kind)
    terms, _ = computed(case)
    distillation = {"composed": {"kl"}, "alone": set()}.get(
        case.constants.kind, {f"kl_level{level}" for level in range(len(case.levels))})
    pulled = {"ensemble"} if any(case.constants.ensemble) else set()
    assert set(terms) == {"ce", "loss"} | distillation | pulled
    for term in terms.values():
        assert term.shape == (len(case.logits),) and term.dtype == torch.float32 and not term.requires_grad
    assert_same_loss(case, sum(terms[name] for name in set(terms) - {"loss"}), terms["loss"])


def test_a_teacher_without_routes_adds_nothing():
    case = make_case(11, "paper own", samples=6)
    case = replace(case, labels=[0] * 6, levels=[[tuple(range(case.logits.shape[-1]))], [(0, 1), (2, 3)]],
                   constants=replace(case.constants, weights=(0.6, 1.0)))
    rows = [torch.linspace(-1, 1, case.logits.shape[-1])] * 6
    case = replace(case, routes=[[(0, n) for n in range(6)], [(0, n) for n in range(6)]],
                   answers=[rows, [row[:2] for row in rows]])
    silent = replace(case, levels=[case.levels[0], [(0, 1)]])
    assert torch.equal(computed(case)[0]["loss"], computed(silent)[0]["loss"])
    assert torch.equal(computed(case)[1], computed(silent)[1])


def test_a_level_without_any_route_is_0():
    case = make_case(3, "paper own", samples=5)
    classes = case.logits.shape[-1]
    case = replace(case, labels=[0] * 5, levels=[[tuple(range(classes))], [(1, 2)]], routes=[[], []], answers=[[], []],
                   constants=replace(case.constants, weights=(0.6, 1.0)))
    terms, gradient = computed(case)
    assert torch.equal(terms["kl_level1"], torch.zeros(len(case.logits))) and gradient.isfinite().all()


def test_the_paper_by_hand():
    """One student, one sample, one teacher of two classes: p = (3/4, 1/4) against q = (1/2, 1/2), T = 1."""
    constants = Constants("paper", 1.0, (0.6, 1.0), (0.0,), (0.0,), own=True)
    uniform, sure = torch.zeros(3), torch.tensor([np.log(3.0), 0.0], dtype=torch.float32)
    levels, routes = [[(0, 1, 2)], [(1, 2)]], [[(0, 0)], [(0, 0)]]
    case = Case(torch.zeros(1, 1, 3), [1], levels, routes, [[uniform], [sure]], constants)
    terms, gradient = computed(case)
    assert terms["ce"].item() == pytest.approx(np.log(3))
    assert terms["kl_level0"].item() == pytest.approx(0, abs=1e-6)
    assert terms["kl_level1"].item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), abs=1e-6)
    assert gradient[0, 0].tolist() == pytest.approx([1 / 3, 1 / 3 - 1 - 0.25, 1 / 3 + 0.25], abs=1e-6)
