"""Tokens in Arrow files, which need not fit into memory; uses the library datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .codec import END, ByteCodec, Codec
from .texts import portions, split

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TEXT", "TOKENS", "Tokens", "encode", "is_dataset", "library", "read_dataset", "sha256"]

TEXT, TOKENS = "text", "input_ids"


class Tokens(NamedTuple):
    """A sequence of tokens.

    Attributes:
        pieces: arrays of token ids, in order.
        bytes: size of the text as UTF-8; None if the source held token ids.
    """

    pieces: Sequence[np.ndarray]
    bytes: int | None


def encode(text: bytes, codec: Codec) -> Tokens:
    """Return the tokens of a text in memory.

    Raises: ImportError if the codec has a tokenizer and datasets is not installed.
    """
    if isinstance(codec, ByteCodec):
        return Tokens([np.frombuffer(text, np.uint8)], len(text))
    rows = library().Dataset.from_dict({TEXT: portions(text)})
    return _tokenise(rows, TEXT, codec, sha256(text), end="")


def is_dataset(path: str | Path) -> bool:
    """Tell whether `save_to_disk` of a Dataset or DatasetDict wrote this folder."""
    folder = Path(path)
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_dataset(folder: str | Path, codec: Codec, column: str, limit: int) -> tuple[Tokens, Tokens, str]:
    """Return the training tokens, the validation tokens and the digest of a saved dataset.

    Args:
        folder: a folder that `save_to_disk` wrote.
        codec: encodes a column of texts.
        column: a column of texts or of token ids. "text" falls back to "input_ids" if there is no such column.
        limit: number of bytes or tokens to hold out, as `texts.split` does, if there is no validation or test split.
    Raises: ValueError for missing splits or columns; ImportError if datasets is not installed.
    """
    train, valid = _splits(folder)
    column = TOKENS if column == TEXT and TEXT not in train.column_names else column
    is_text = _is_text(train, column, folder)
    digest = sha256(column, train._fingerprint, valid._fingerprint if valid else "")
    if valid is None and len(train) < 20:
        return *_few(train[column], is_text, codec, limit), digest
    if valid is None:
        train, valid = _hold_out(train.select_columns(column), column, limit)
    elif _is_text(valid, column, folder) != is_text:
        raise ValueError(f"column {column} of {folder} must hold the same in every split; got texts and token ids")
    read = _tokenise if is_text else _as_they_are
    return read(train, column, codec, digest + "train"), read(valid, column, codec, digest + "valid"), digest


def sha256(*parts: str | bytes) -> str:
    """Return the SHA-256 of the concatenated parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else part.encode())
    return whole.hexdigest()


def library() -> Any:
    """Import and return the library datasets. Raises: ImportError that tells how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'a tokenizer or a saved dataset needs the library datasets; pip install "multiscale-retention[datasets]"'
        ) from error
    return datasets


def _splits(folder: str | Path) -> tuple[Dataset, Dataset | None]:
    loaded = library().load_from_disk(str(folder))
    if not isinstance(loaded, dict):
        return loaded.with_format(None), None
    if "train" not in loaded:
        raise ValueError(f"{folder} must have a split train; got {', '.join(loaded)}; or name one split's own folder")
    valid = next((loaded[name] for name in ("validation", "valid", "test") if name in loaded), None)
    return loaded["train"].with_format(None), None if valid is None else valid.with_format(None)


def _is_text(rows: Dataset, column: str, folder: str | Path) -> bool:
    """Tell whether a column holds texts, not lists of token ids. Raises: ValueError if it holds neither."""
    if column not in rows.column_names:
        raise ValueError(
            f"{folder} must have a column {column}; got {', '.join(rows.column_names)}; name the texts' --text-column"
        )
    kind = rows.features[column]
    if getattr(kind, "dtype", "") in ("string", "large_string"):
        return True
    if "int" in str(getattr(getattr(kind, "feature", None), "dtype", "")):
        return False
    raise ValueError(f"column {column} of {folder} must hold texts or lists of token ids; got {kind}")


def _few(rows: Iterable[Any], is_text: bool, codec: Codec, limit: int) -> tuple[Tokens, Tokens]:
    """Hold out the end of each of a few long documents."""
    documents = [row for row in rows if row]
    if is_text:
        train, valid = split([(text + END).encode() for text in documents], limit)
        return encode(train, codec), encode(valid, codec)
    cuts = [np.split(np.asarray(ids), [len(ids) * 19 // 20]) for ids in documents]
    return Tokens([kept for kept, _ in cuts], None), Tokens([held_out for _, held_out in cuts], None)


def _hold_out(rows: Dataset, column: str, limit: int) -> tuple[Dataset, Dataset]:
    """Hold out every 20th row, and keep the first of these that together hold `limit` characters or tokens."""
    numbers = np.arange(len(rows))
    held_out = rows.select(numbers[::20])
    count = size = 0
    while count < len(held_out) and size < limit:
        size += len(held_out[count][column] or "")
        count += 1
    return rows.select(numbers[numbers % 20 != 0]), held_out.select(range(count))


def _tokenise(rows: Dataset, column: str, codec: Codec, key: str, end: str = END) -> Tokens:
    """Encode a column of texts, each followed by `end`; the cache of datasets keeps the result."""

    def tokens_of(batch: dict[str, list[str | None]]) -> dict[str, list[Any]]:
        texts = [text + end if text else "" for text in batch[column]]
        return {TOKENS: codec.encode(texts), "bytes": [len(text.encode()) for text in texts]}

    datasets = library()
    width = datasets.Value(np.min_scalar_type(codec.size - 1).name)
    batch = max(1, min(1000, 2**22 * rows.data.num_rows // (rows.data.nbytes + 1)))  # about 4 MB per batch
    done = rows.map(
        tokens_of,
        batched=True,
        batch_size=batch,
        writer_batch_size=batch,
        remove_columns=rows.column_names,
        features=datasets.Features({TOKENS: [width], "bytes": datasets.Value("int64")}),
        desc="tokenising",
        **_cached(key, codec.digest),  # datasets would else hash the tokenizer, whose state changes with use
    )
    return Tokens(_flat(done, TOKENS), sum(done["bytes"]))


def _as_they_are(rows: Dataset, column: str, codec: Codec, key: str) -> Tokens:
    if rows._indices is not None:
        rows = rows.flatten_indices(**_cached(key))
    return Tokens(_flat(rows, column), None)


def _cached(*key: str) -> dict[str, str]:
    """Options that let datasets find its earlier results, even for a dataset in a read-only folder."""
    digest = sha256(*key)
    folder = Path(library().config.HF_DATASETS_CACHE) / "retention"
    folder.mkdir(parents=True, exist_ok=True)
    return {"cache_file_name": str(folder / f"{digest}.arrow"), "new_fingerprint": digest}


def _flat(rows: Dataset, column: str) -> list[np.ndarray]:
    """Return a column of lists as concatenated arrays, without reading it."""
    return [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in rows.data.column(column).chunks]
