"""Checks of untrusted files before they are read, and strict JSON. Needs the standard library only."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["check_file", "listed", "one_line", "read_json", "refused"]

_LARGEST_JSON = 64 * 2**20  # bytes; the index of a thousand shards has less than a tenth of it
_DEEPEST_JSON = 32  # levels of nested objects and lists; configs of composed models have about five
_LARGEST_INTEGER = 2**63 - 1


def check_file(file: Path) -> None:
    """Check that a path is a regular file with contents.

    Raises: OSError if it cannot be opened; ValueError for an empty file, a folder, a pipe, a socket or a device.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} must be a regular file, not {_kind(found.st_mode)}")
    if not found.st_size:
        raise ValueError(f"{file} is empty")
    file.open("rb").close()  # its OSError names the file; those of other libraries may not


def read_json(file: Path, holds: str = "options by name, {...}") -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        file: the file.
        holds: describes the expected object, for the error.
    Raises: OSError, or ValueError if the file holds no JSON object, a name twice, NaN, infinity, or an integer beyond
        64 bits, or is much larger or deeper nested than a config.
    """
    check_file(file)
    if (size := file.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{file} must have at most {_LARGEST_JSON:,} bytes to be read as JSON; it has {size:,}")
    try:
        found = json.loads(
            file.read_bytes().decode(),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        _check_depth(found, _DEEPEST_JSON)
    except (ValueError, RecursionError) as error:
        why = f"it is nested deeper than {_DEEPEST_JSON}" if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"{file} must be JSON; {why}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold {holds}; got {type(found).__name__}")
    return found


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn any error inside the block into a ValueError of one line that begins with `what`.

    It surrounds calls of other libraries with contents of files, as the types of their errors are unknown.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def one_line(error: object, most: int = 300) -> str:
    """Return an error's message on one line of at most `most` characters; the error's type if it has no message."""
    text = "".join(c if c.isprintable() else " " for c in str(error) or type(error).__name__)
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[str], most: int = 10) -> str:
    """Join names by commas: the first `most` of them, each on one line, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name) for name in names[:most]) + more


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} more than once")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"numbers must be finite; got {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_constant(one_line(text, 40))
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) > _LARGEST_INTEGER:
        raise ValueError(f"integers must be at most {_LARGEST_INTEGER}; got {one_line(text, 40)}")
    return value


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise RecursionError
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, left - 1)
