"""Files that are written whole or not at all, checkpoints that are known to be whole, and one run to a folder.

What is written goes into a folder aside first, then onto the disk, then by renaming to its place, so that a run that is
killed at any moment leaves what was there before or what is new, and nothing between.
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

SUMS = "SHA256SUMS"  # of a checkpoint: a digest for each file, as `sha256sum -c` reads it
ASIDE = ".unfinished"
LOCK = ".lock"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold `out` for one run. What was made for that goes again if nothing else came into it.

    Raises: ValueError if another run holds it. A run that was killed does not.
    """
    check_folder(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock = FileLock(out / LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except PermissionError as error:
        raise ValueError(
            f"out must be a folder that may be written to; {error.filename} may not; name another"
        ) from None
    except Timeout:
        raise ValueError(f"another run writes to {out}; wait for its end, or name another --out") from None
    except NotImplementedError:  # some file systems of clusters have no locks
        tqdm.write(f"{out} cannot be locked; see to it that no other run writes there")
    try:
        yield
    finally:
        if made and {path.name for path in out.iterdir()} <= {LOCK, ASIDE}:
            shutil.rmtree(out)
            with suppress(OSError):  # something else came into it
                for folder in made[1:]:
                    folder.rmdir()
        lock.release()


def check_folder(out: Path) -> None:
    """Raises: ValueError if `out` cannot be a folder."""
    file = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"out must be a folder; {file} is a file; name another --out")


def holds_run(out: Path) -> bool:
    """Whether a run has got as far as a checkpoint or a model in `out`."""
    found = (path for path in out.rglob("checkpoint-*") if ASIDE not in path.parts)
    return (out / "config.json").exists() or any(_CHECKPOINT.fullmatch(path.name) for path in found)


@contextmanager
def written_whole(out: Path, what: str, *, as_folder: str = "") -> Iterator[Path]:
    """An empty folder to write in. At the end its files take their places in `out`, or it becomes `out/as_folder`.

    what: is written, for the error. Raises: NotSavedError, after which `out` is as it was before.
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
    """Raises: NotSavedError."""
    with written_whole(file.parent, file.name) as folder:
        (folder / file.name).write_text(text)


def remove_older(out: Path, kept: Sequence[str]) -> None:
    """Remove what is older than the newest of these checkpoints, by name, and is not among them."""
    for path in checkpoints(out):
        if path.name not in kept and step_of(path) < step_of(out / kept[-1]):
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(out: Path) -> list[Path]:
    """What may be checkpoints by their names, the newest first."""
    found = [path for path in out.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(out: Path) -> Path | None:
    """The newest that is whole; a line is printed for each that is newer and damaged, or has no step in its name."""
    for path in sorted(out.glob("checkpoint-*")):
        if not _CHECKPOINT.fullmatch(path.name):
            tqdm.write(f"{path} is left out: a checkpoint is called checkpoint- and the number of its step")
    for path in checkpoints(out):
        damage = damage_of(path)
        if not damage:
            return path
        tqdm.write(f"{path} is left out: {damage}")
    if checkpoints(out):
        tqdm.write(f"no checkpoint in {out} is whole; the training begins again")
    return None


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; nothing if it is as it was written."""
    if not checkpoint.is_dir():
        return "it is no folder"
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except FileNotFoundError:
        return f"it has no {SUMS}, so it was not written to its end"
    except (OSError, ValueError):
        return f"its {SUMS} is damaged"
    if list(sums)[-1:] != [TRAINER_STATE_NAME]:  # which is the last that is entered
        return f"its {SUMS} is damaged"
    for name, digest in sums.items():
        try:
            if digest_of(checkpoint / name) != digest:
                return f"its {name} is damaged"
        except FileNotFoundError:
            return f"its {name} is missing"
        except OSError as error:
            return f"its {name} cannot be read: {error.strerror}"
    return ""


def digest_of(file: Path) -> str:
    """A SHA-256."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _seal(checkpoint: Path) -> None:
    """Bring a checkpoint onto the disk, with the digests of its files."""
    names = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    names.sort(key=lambda name: name == TRAINER_STATE_NAME)
    sums = "".join(f"{digest_of(checkpoint / name)}  {name}\n" for name in names)
    (checkpoint / SUMS).write_text(sums)
    for path in (*checkpoint.rglob("*"), checkpoint):
        _sync(path)


def _move(source: Path, target: Path) -> None:
    """Put every file of one folder into another, in the place of what has its name there."""
    files = [path for path in source.rglob("*") if path.is_file()]
    for file in files:
        _sync(file)
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True, parents=True)
        file.replace(place)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # there is no such call for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not(folder: Path, error: Exception) -> str:
    """Why something could not be written. torch does not hand on what the system says, so one more try asks it."""
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
    found = next((path for path in checkpoints(out) if not damage_of(path)), None)
    if found is None:
        return "no checkpoint is kept there; make room or name another --out, and begin again"
    return f"{found.name} is kept; make room, and continue with --resume"
