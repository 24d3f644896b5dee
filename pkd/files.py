"""Files that are whole or absent: written beside, synced, renamed."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pkd.errors import PassingError, UserError

# What the system answers while a file server is busy, moved or away, or a process has too many files open.
PASSING = frozenset(getattr(errno, name) for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH",
                                                      "EREMOTEIO", "EMFILE", "ENFILE") if hasattr(errno, name))


def write_bytes(path: Path, content: bytes) -> None:
    """Raises UserError where the disk is full or the folder not writable, or PassingError; what was there before stays."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise unwritable(path, error, len(content)) from None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` once all is written; after an error nothing of it is left.

    Raises UserError, before anything is written, where `target` is there already and is not an empty folder.
    """
    target = Path(os.path.realpath(target))
    beside = target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} already exists and is not empty: give a new folder")
        beside.mkdir(parents=True)
    except OSError as error:
        raise unwritable(target, error, 0) from None
    try:
        yield beside
        os.rename(beside, target)  # over an empty folder, but over no other
        sync_folder(target.parent)
    except OSError as error:
        raise unwritable(target, error, 0) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes that fill a folder by another's code, which is not made for that, do so one after the other.

    Where the folder cannot be locked they do not wait: it may well hold everything and be read-only.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(folder / ".pkd.lock", "a", encoding="utf-8")), fcntl.LOCK_EX)
        yield


def write_json(path: Path, tree) -> None:
    write_bytes(path, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """Raises UserError where the file is missing or no JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is needed, but it is not there") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise_passing(path, error)
        raise UserError(f"{path} is damaged and cannot be read as JSON ({error}): delete it or restore it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return tree


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; a last line that a killed process left half written is passed over."""
    objects = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


def append_line(path: Path, tree: dict) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(tree) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error, 0) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(file.read()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def raise_passing(path: Path, error: Exception) -> None:
    """Raises PassingError if `error`, which came of `path`, says nothing of the file itself and may be gone soon."""
    if isinstance(error, OSError) and error.errno in PASSING:
        raise PassingError(f"{path}: the system answered {error.strerror or errno.errorcode[error.errno]!r}, which often "
                           "passes: the same command goes on from the last checkpoint") from error


def unwritable(path: Path, error: OSError, size: int) -> UserError:
    raise_passing(path, error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free
        return UserError(f"{path} ({size} bytes) could not be written, {error.strerror.lower()} ({free} bytes free): "
                         "make room and start the same command again, nothing that was saved is lost")
    return UserError(f"{path} could not be written ({error.strerror}): check that the folder exists and is yours")
