"""Atomic writes of files, verified checkpoints, and a lock that gives each folder to one run.

Files are first written to a separate folder, flushed to disk and then renamed, so that a run that is killed at any
moment leaves either the old files or the new ones.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from retention.errors import NotSavedError

from ..compat import TRAINER_STATE_NAME

__all__ = [
    "ASIDE",
    "SUMS",
    "alone_in",
    "check_folder",
    "checkpoints",
    "holds_run",
    "last_checkpoint",
    "remove_older",
    "step_of",
    "write_text",
    "written_whole",
]

SUMS = "SHA256SUMS"  # in each checkpoint: the digests of its files, in the format of `sha256sum -c`
ASIDE = ".unfinished"
_LOCK = ".lock"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Lock `out` for one run, creating it if needed; a created folder is removed if it stays empty.

    Raises: ValueError if another run holds the lock, or `out` cannot be written. The lock of a killed run is free.
    """
    check_folder(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock = FileLock(out / _LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except PermissionError as error:
        raise ValueError(
            f"out must be a folder that may be written to; {error.filename} may not; name another"
        ) from None
    except Timeout:
        raise ValueError(f"another run writes to {out}; wait for its end, or name another --out") from None
    except NotImplementedError:  # some network file systems have no locks
        tqdm.write(f"{out} cannot be locked; make sure that no other run writes there")
    try:
        yield
    finally:
        if made and {path.name for path in out.iterdir()} <= {_LOCK, ASIDE}:
            shutil.rmtree(out)
            with suppress(OSError):  # the folder holds other files by now
                for folder in made[1:]:
                    folder.rmdir()
        lock.release()


def check_folder(out: Path) -> None:
    """Raises: ValueError if `out` is a file or lies below one."""
    file = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"out must be a folder; {file} is a file; name another --out")


def holds_run(out: Path) -> bool:
    """Tell whether `out` contains a checkpoint or a model."""
    found = (path for path in out.rglob("checkpoint-*") if ASIDE not in path.parts)
    return (out / "config.json").exists() or any(_CHECKPOINT.fullmatch(path.name) for path in found)


@contextmanager
def written_whole(out: Path, what: str, *, as_folder: str = "") -> Iterator[Path]:
    """Give the block an empty folder, and move its files to `out` when the block ends.

    Args:
        out: the target folder.
        what: names the files, for the error.
        as_folder: name of a subfolder that the block writes; it replaces `out/as_folder` as a whole.
    Raises: NotSavedError if anything fails; `out` then keeps its old files.
    """
    aside = out / ASIDE
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if as_folder:
            _seal(aside / as_folder)
            shutil.rmtree(out / as_folder, ignore_errors=True)
            (aside / as_folder).rename(out / as_folder)
        else:
            _move(aside, out)
        _sync(out)
    except Exception as error:
        reason = _why_not(aside, error)
        shutil.rmtree(aside, ignore_errors=True)
        raise NotSavedError(f"{what} could not be written to {out}: {reason}; {_kept(out)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically. Raises: NotSavedError."""
    with written_whole(file.parent, file.name) as folder:
        (folder / file.name).write_text(text)


def remove_older(out: Path, kept: Sequence[str]) -> None:
    """Remove the checkpoints that are older than the last one in `kept` and not in `kept` (names)."""
    for path in checkpoints(out):
        if path.name not in kept and step_of(path) < step_of(out / kept[-1]):
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(out: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, newest first."""
    found = [path for path in out.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint, or None; print a line for each one that is skipped."""
    for path in sorted(out.glob("checkpoint-*")):
        if not _CHECKPOINT.fullmatch(path.name):
            tqdm.write(f"{path} is left out: a checkpoint is called checkpoint- and the number of its step")
    for path in checkpoints(out):
        damage = _damage_of(path)
        if not damage:
            return path
        tqdm.write(f"{path} is left out: {damage}")
    if checkpoints(out):
        tqdm.write(f"no checkpoint in {out} is whole; the training begins again")
    return None


def _damage_of(checkpoint: Path) -> str:
    """Describe the damage of a checkpoint; "" if all its files are as they were written."""
    if not checkpoint.is_dir():
        return "it is no folder"
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except FileNotFoundError:
        return f"it has no {SUMS}, so it was not written to its end"
    except (OSError, ValueError):
        return f"its {SUMS} is damaged"
    if list(sums)[-1:] != [TRAINER_STATE_NAME]:  # the last entry that `_seal` writes
        return f"its {SUMS} is damaged"
    for name, digest in sums.items():
        try:
            if _digest_of(checkpoint / name) != digest:
                return f"its {name} is damaged"
        except FileNotFoundError:
            return f"its {name} is missing"
        except OSError as error:
            return f"its {name} cannot be read: {error.strerror}"
    return ""


def _digest_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _seal(checkpoint: Path) -> None:
    """Write the digests of a checkpoint's files and flush all of them to disk."""
    names = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    names.sort(key=lambda name: name == TRAINER_STATE_NAME)
    sums = "".join(f"{_digest_of(checkpoint / name)}  {name}\n" for name in names)
    (checkpoint / SUMS).write_text(sums)
    for path in (*checkpoint.rglob("*"), checkpoint):
        _sync(path)


def _move(source: Path, target: Path) -> None:
    """Move all files of one folder to another and replace those with the same names."""
    files = [path for path in source.rglob("*") if path.is_file()]
    for file in files:
        _sync(file)
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True, parents=True)
        file.replace(place)


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot flush folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not(folder: Path, error: Exception) -> str:
    """Return why a file could not be written; torch hides the system's reason, so another write is tried."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        probe = folder / "probe"
        probe.write_bytes(bytes(1 << 16))
        _sync(probe)
    except OSError as found:
        return found.strerror or str(found)
    return str(error).partition("\n")[0] or type(error).__name__


def _kept(out: Path) -> str:
    found = next((path for path in checkpoints(out) if not _damage_of(path)), None)
    if found is None:
        return "no checkpoint is kept there; make room or name another --out, and begin again"
    return f"{found.name} is kept; make room, and continue with --resume"
