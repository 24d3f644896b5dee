"""The phases of a run in order, each on all ranks, going on where the run folder stands.

What came of a phase is read from the run folder, never from an exit code: torchrun and deepspeed have their own, and
srun reports that of whichever rank it ended itself.
"""

import os
import shlex
import signal
import subprocess
import time

import psutil

from pkd import slurm_job
from pkd.console import Console
from pkd.files import read_json
from pkd.order import Order, is_done
from pkd.run_folder import RunFolder
from pkd.stop import signalled
from pkd.summary import table
from pkd.ways import environment

AGAIN = 5.0  # seconds between two signals to srun


def run_phases(order: Order, console: Console, dry_run: bool) -> int:
    """Run the phases; the exit code. Raises UserError before anything is started."""
    begun = False
    for phase in order.phases:
        if is_done(order, phase):  # asked in its turn: other teachers make an archive a thing of the past
            console.say(f"{phase}: done already")
            continue
        begun, said = True, shlex.join(order.command(phase))
        if dry_run:
            console.report(said)
            continue
        console.say(f"{phase}: {said}")
        outcome = "stopped" if signalled.yes else run_phase(order, phase)
        if outcome != "finished":
            return after(order, phase, outcome, console)
    if not begun and "evaluate" in order.phases:
        console.show(table(read_json(order.run / "summary.json")))
    return 0


def run_phase(order: Order, phase: str) -> str:
    """Start a phase and wait for its end: "finished", "stopped" (by a signal), "refused" or "failed"."""
    run, name = RunFolder(order.run), order.name(phase)
    before = run.state(name)
    if order.way == "srun-deepspeed":
        slurm_job.write_hostfile(order.hostfile(phase), os.environ)
    # Ctrl-C is for this process, which tells the ranks; the launchers' own answer to it leaves ranks no time to save.
    child = subprocess.Popen(order.command(phase), env={**os.environ, **environment(order.way, os.environ)},
                             start_new_session=not order.way.startswith("srun"))
    try:
        _wait(order, name, child)
    except KeyboardInterrupt:
        _kill(order, name, child)
        raise
    if is_done(order, phase):
        return "finished"
    now = run.state(name)
    if now != before and now["state"] in ("stopped", "refused"):
        return now["state"]
    return "refused" if child.returncode == 2 else "stopped" if signalled.yes and now == before else "failed"


def _wait(order: Order, name: str, child: subprocess.Popen) -> None:
    """Until all of a phase's processes have ended; meanwhile signals are passed on to them."""
    told = None  # when
    while child.poll() is None or (order.way == "deepspeed" and _ranks_alive(order, name)):
        # Ranks that outlive DeepSpeed's launcher have lost nothing but it: they stop and save as after a signal. Ranks that
        # are just starting may miss a signal, and they take several for one; torchrun would not.
        due = told is None or (order.way in ("here", "srun", "srun-deepspeed") and time.monotonic() - told > AGAIN)
        if due and (signalled.yes or child.poll() is not None) and _forward(order, name, child):
            told = time.monotonic()
        time.sleep(0.1)


def _kill(order: Order, name: str, child: subprocess.Popen) -> None:
    if order.way.startswith("srun"):
        return child.terminate()  # srun ends its ranks itself
    doomed = _ranks_alive(order, name)
    if child.poll() is None:
        parent = psutil.Process(child.pid)
        doomed += [parent, *parent.children(recursive=True)]
    for process in doomed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def after(order: Order, phase: str, outcome: str, console: Console) -> int:
    """What follows on an end that is not the phase's: under Slurm the job is queued again where that may help."""
    in_slurm = order.way in ("srun", "srun-deepspeed")
    if outcome == "stopped" and not in_slurm:
        console.say(f"{phase} was stopped by a signal, everything is saved: the same command goes on from here")
        return 0
    if in_slurm and outcome != "refused" and slurm_job.may_try_again(order.run, order.name(phase), outcome, console):
        if slurm_job.requeue(console):
            return 0 if outcome == "stopped" else 1
        slurm_job.tell_who_waited(order.run, order.name(phase), console)
        return 1
    if in_slurm:
        slurm_job.tell_who_waited(order.run, order.name(phase), console)
    if outcome == "refused":
        return 2
    console.error(f"pkd: {phase} {outcome}: see what the ranks said above and in {order.run / 'logs'}; the same command "
                  "goes on from the last checkpoint")
    return 1


def _forward(order: Order, name: str, child: subprocess.Popen) -> bool:
    """Pass a signal on to the ranks; whether there was anybody to pass it to."""
    if order.way != "deepspeed":
        if child.poll() is None:
            child.send_signal(signal.SIGUSR1)  # torchrun and srun hand it to every rank
        return True
    ranks = _ranks_alive(order, name)  # DeepSpeed's launcher hands nothing on
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    return bool(ranks)


def _ranks_alive(order: Order, name: str) -> list[psutil.Process]:
    """The ranks on this machine that have introduced themselves in the run folder and still run."""
    path = order.run / "ranks" / f"{name}.json"
    out = []
    for rank in read_json(path)["ranks"] if path.exists() else []:
        try:
            process = psutil.Process(rank["pid"])
            if abs(process.create_time() - rank["started"]) < 0.1 and process.status() != psutil.STATUS_ZOMBIE:
                out.append(process)
        except psutil.Error:
            continue
    return out
