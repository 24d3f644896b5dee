"""The main invariants on a GPU, in one process and with two to four ranks that share it; skipped where there is none.

Islands have one rank each, for NCCL wants a GPU for every rank of a group: several student ranks are groups of students.
"""

import os

import pytest
import torch
from ranks import run, students, trace

from pkd.loss import LevelTargets, pyramid_loss
from pkd.models import build
from pkd.objective import Constants
from pkd.recipe import Model
from pkd.teacher import TeacherHost

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
EXACT = "deterministic=true"
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", "0")


def on_gpu(world: int, *arguments) -> None:
    """As run(), whose ranks see no GPU otherwise; each a process of its own, for CUDA does not survive a fork."""
    run(world, *arguments, prefix=("env",), env=lambda rank: {"CUDA_VISIBLE_DEVICES": VISIBLE})


@pytest.fixture(scope="module")
def alone(tiny, taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    on_gpu(1, "distill", tiny, "--run-folder", folder, f"teachers_from={taught}", EXACT)
    return folder


@pytest.mark.parametrize(("world", "placement"), [
    (2, ("placement.kind=dedicated",)), (3, ("placement={kind: dedicated, student_ranks: 1}", "exchange=direct")),
    (2, ("placement={kind: co-located, student_groups: 2}",)),
    (4, ("placement={kind: dedicated, student_ranks: 2, student_groups: 2}", "teacher_views=sent")),
])
def test_ranks_that_share_a_gpu_come_to_the_students_of_one_process_bit_for_bit(tiny, new_run, alone, world, placement):
    folder, teachers_from = new_run("shared")
    on_gpu(world, "distill", tiny, "--run-folder", folder, teachers_from, EXACT, *placement)
    assert (trace(folder), students(folder)) == (trace(alone), students(alone))


def test_a_stopped_run_goes_on_bit_for_bit(tiny, new_run, alone):
    folder, teachers_from = new_run("stopped")
    words = ("distill", tiny, "--run-folder", folder, teachers_from, EXACT)
    on_gpu(1, *words, "--steps", 14)
    on_gpu(1, *words)
    assert (trace(folder), students(folder)) == (trace(alone), students(alone))


def test_the_archive_serves_the_losses_of_the_teachers(tiny, new_run):
    """A GPU may give a sample other last bits elsewhere in its block, and fp16 then rounds some logits to a neighbour."""
    (online, teachers_from), (archived, _) = new_run("online"), new_run("archived")
    words = (teachers_from, EXACT, "views.finite=1")
    on_gpu(1, "distill", tiny, "--run-folder", online, *words)
    on_gpu(1, "archive", tiny, "--run-folder", archived, *words)
    on_gpu(1, "distill", tiny, "--run-folder", archived, *words, "soft_targets=archive")
    for one, other in zip(trace(online), trace(archived), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2), one["step"]


@pytest.mark.parametrize("config", ["zero0", "zero0-autocast", "zero1-bf16", "zero1-fp16", "zero1-autocast", "zero3"])
def test_every_dtype_and_the_last_stage_train(tiny, new_run, config):
    folder, teachers_from = new_run(config)
    on_gpu(1, "distill", tiny, "--run-folder", folder, teachers_from, f"deepspeed.students={config}",
           "teachers.forward=fp32")
    lines = trace(folder)
    for name in ("mobile", "shuffle"):
        assert sum(line["loss"][name] for line in lines[-5:]) < sum(line["loss"][name] for line in lines[:5])


def test_the_loss_and_its_gradient_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    logits, answers = torch.randn(2, 16, 10, generator=generator), torch.randn(16, 10, generator=generator).half()
    classes, rows = torch.arange(10).expand(16, -1), torch.arange(16)
    mask, share = torch.ones(16, 10, dtype=torch.bool), torch.full((16,), 1 / 16)
    found = []
    for device in ("cpu", "cuda"):
        own = logits.clone().to(device).requires_grad_()
        targets = LevelTargets(*(tensor.to(device) for tensor in (answers, classes, mask, rows, share)), 1)
        loss, terms = pyramid_loss(own, rows.to(device) % 10, [targets], 16,
                                   Constants("paper", 20.0, (1.0,), (0.2, 0.8), (0.0, 0.1), True))
        loss.backward()
        found.append((terms["loss"].cpu(), own.grad.cpu()))
    for one, other in zip(*found):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_a_teacher_answers_beside_a_busy_stream_with_the_same_bits():
    torch.manual_seed(0)
    device = torch.device("cuda")
    network = build(Model(name="pkd_resnet_s"), 10, 1, (8, 8))
    host = TeacherHost(0, {0: network}, None, device, bf16=False)
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    quiet = host.forward(0, images)
    load = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        load = (load @ load).tanh()  # of the default stream, not waited for
    assert torch.equal(host.forward(0, images), quiet)
