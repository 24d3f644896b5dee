"""One writer at a time: advisory locks on open files, with a record of who holds them.

The system drops such a lock when its holder dies, however it dies; only a node that loses its power may leave one on the
file server for a while. A lock whose holder Slurm knows to be gone, or which an earlier start of this very job left, is
therefore taken over: a new file takes the old one's place, and whoever holds the old one holds nothing.
"""

import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from pathlib import Path

from pkd.errors import UserError
from pkd.files import unwritable

PATIENCE = 5.0  # seconds for a job that is just ending to let go
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """Held until the process ends or release(). Raises UserError where another job holds it.

    shared: many holders of this kind exclude one that is not shared. others: files of locks that may be held beside a
    shared one, whose holders must be gone too before this one is taken over.
    """

    def __init__(self, path: Path, phase: str, shared: bool = False, others: list[Path] | None = None):
        self.path, self.remark = path, None
        self.record = {"phase": phase, "host": socket.gethostname(), "pid": os.getpid(), **slurm_job(),
                       "since": time.time()}
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        deadline = time.monotonic() + PATIENCE
        while not self._take(kind):
            if time.monotonic() > deadline:
                holders = [holder for file in [path, *(others or [])] if (holder := held_by(file)) is not None]
                if not holders or not all(_is_dead(holder) for holder in holders):
                    raise UserError(f"run folder {path.parent} is being written by another job "
                                    f"({told(holders[0]) if holders else 'which left no word'}): wait for it, end it, or "
                                    "give another folder with --run-folder")
                self.remark = f"the lock that {told(holders[0])} left is taken over: that job is dead"
                self._replace()
                deadline += PATIENCE
            time.sleep(0.1)
        self._write_record()

    @property
    def inode(self) -> int:
        return os.fstat(self.file.fileno()).st_ino

    def check(self) -> None:
        """Raises UserError if another job took this lock over, having every reason to think that this one was dead."""
        check_inode(self.path, self.inode)

    def release(self) -> None:
        self.file.close()

    def _take(self, kind: int) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise unwritable(self.path, error, 0) from None
        try:
            fcntl.flock(self.file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise unwritable(self.path, error, 0) from None
            self.remark = f"the file system of {self.path.parent} has no locks: start no second job in that folder"
            return True
        if self._is_current():
            return True
        self.file.close()  # it was taken over between open and lock
        return False

    def _is_current(self) -> bool:
        try:
            return os.stat(self.path).st_ino == self.inode
        except OSError:
            return False

    def _replace(self) -> None:
        fresh = self.path.with_name(f".{self.path.name}.{socket.gethostname()}-{os.getpid()}")
        fresh.write_text("", encoding="utf-8")
        os.replace(fresh, self.path)

    def _write_record(self) -> None:
        self.file.truncate(0)
        self.file.write(json.dumps(self.record) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())  # or other nodes may read an empty record for a while


def check_inode(path: Path, inode: int) -> None:
    """Raises UserError if `path` is not that file any more: another job took the lock over."""
    try:
        same = os.stat(path).st_ino == inode
    except OSError:
        same = False
    if not same:
        raise UserError(f"another job ({told(held_by(path) or {})}) has taken run folder {path.parent} over while this one "
                        "could not be reached: this one ends without writing")


def held_by(path: Path) -> dict | None:
    """The record of who holds a lock, {} if it is held without a readable one, None if nobody does."""
    for mode in ("r+", "r"):  # some file systems lock only what may be written, some users may only read
        try:
            with open(path, mode, encoding="utf-8") as file:
                try:
                    fcntl.flock(file, (fcntl.LOCK_EX if mode == "r+" else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                except BlockingIOError:
                    return _record(file.read())
            return None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBADF):
                return None
    return {} if path.exists() else None


def told(record: dict) -> str:
    """A holder as a person reads it."""
    if not record:
        return "an unknown job"
    job = f"Slurm job {record['job']}, " if record.get("job") else ""
    return f"{record.get('phase')}, {job}pid {record.get('pid')} on {record.get('host')}"


def _record(text: str) -> dict:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def slurm_job() -> dict:
    """This process's Slurm job and how often it was started before, or {}."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    return {"job": os.environ["SLURM_JOB_ID"], "start": int(os.environ.get("SLURM_RESTART_COUNT", "0")), **_cluster()}


def _cluster() -> dict:
    """Several clusters may write one file system, and each numbers its own jobs."""
    return {"cluster": os.environ["SLURM_CLUSTER_NAME"]} if "SLURM_CLUSTER_NAME" in os.environ else {}


def _is_dead(record: dict) -> bool:
    """Whether a holder is surely gone: an earlier start of this job, or a Slurm job that is over."""
    job, mine = record.get("job"), slurm_job()
    if not job or record.get("cluster") != mine.get("cluster", record.get("cluster")):
        return False
    if job == mine.get("job"):
        return record.get("start", 0) < mine["start"]
    try:
        asked = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format", "%T"], capture_output=True, text=True,
                               timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    alive = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "CONFIGURING", "STAGE_OUT")
    unknown = "Invalid job id" in asked.stderr
    return unknown or (asked.returncode == 0 and not any(state in asked.stdout for state in alive))
