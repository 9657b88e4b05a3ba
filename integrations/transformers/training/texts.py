"""Reads text files and splits their documents into training and validation text."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from .codec import END
from .progress import progress_bar

__all__ = ["portions", "read_texts", "split"]

_END = END.encode()


def read_texts(
    files: Sequence[str | Path] = (), *, skip: Path | None = None, validation_limit: int = 100_000
) -> tuple[bytes, bytes]:
    """Return training and validation text in which a zero byte ends each document.

    Hidden files and files with zero bytes are left out. `split` chooses the validation text.

    Args:
        files: text files, or folders of them; none: the source of the Python standard library.
        skip: a folder to leave out.
        validation_limit: largest size of the validation text, in bytes.
    Raises: ValueError for a path that does not exist, or if there is no text.
    """
    paths = list(_documents(files)) if files else _standard_library()
    paths = [path for path in paths if skip is None or not path.resolve().is_relative_to(skip.resolve())]
    with progress_bar("reading", total=len(paths), unit="file") as bar:
        texts = [text for text in (_read(path, bar) for path in paths) if _END not in text]
    if not texts:
        raise ValueError(f"the corpus must hold at least one text; got none in {', '.join(map(str, files))}")
    return split([text + _END for text in texts], validation_limit)


def _read(path: Path, bar: tqdm) -> bytes:
    bar.update()
    return path.read_bytes()


def split(documents: list[bytes], validation_limit: int) -> tuple[bytes, bytes]:
    """Return training and validation text.

    Of 20 or more documents, every 20th is held out for validation; of fewer documents, the last 5 % of each. The
    validation text is cut to `validation_limit` bytes.
    """
    if len(documents) >= 20:
        held_out = documents[::20]
        kept = [text for i, text in enumerate(documents) if i % 20]
    else:
        cuts = [_between_characters(text, len(text) * 19 // 20) for text in documents]
        held_out = [text[cut:] for text, cut in zip(documents, cuts, strict=True)]
        kept = [text[:cut] for text, cut in zip(documents, cuts, strict=True)]
    valid = b"".join(held_out)
    return b"".join(kept), valid[: _between_characters(valid, validation_limit)]


def portions(text: bytes, size: int = 1_000_000) -> list[str]:
    """Return the documents of a text, cut into pieces of at most `size` characters, at line ends where possible."""
    found = []
    for document in text.decode(errors="replace").split(END):
        ended, begin = document + END, 0
        while begin < len(ended):
            end = begin + size
            if end < len(ended):
                end = ended.rfind("\n", begin, end) + 1 or end
            found.append(ended[begin:end])
            begin = end
    found[-1] = found[-1].removesuffix(END)  # the text after the last END is empty, or a document without an end
    return found


def _between_characters(text: bytes, place: int) -> int:
    """Return `place`, or the nearest earlier place at which UTF-8 may be cut."""
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _documents(files: Iterable[str | Path]) -> Iterable[Path]:
    for file in map(Path, files):
        if file.is_dir():
            yield from sorted(
                path for path in file.rglob("*") if path.is_file() and not _hidden(path.relative_to(file))
            )
        elif file.is_file():
            yield file
        else:
            raise ValueError(f"no such file or folder: {file}")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
