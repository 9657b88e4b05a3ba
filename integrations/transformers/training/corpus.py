"""The corpus of a training: blocks of tokens for training and for validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .arrow import Tokens, encode, is_dataset, read_dataset, sha256
from .codec import Codec
from .texts import read_texts

__all__ = ["Blocks", "Corpus", "read_corpus"]


class Blocks(Dataset):
    """A sequence of tokens that is cut into examples of `context` tokens.

    An example is {"input_ids": (context,), "labels": (context,)}, both the same int64 tensor.

    Args:
        part: "training" or "validation", for errors.
        pieces: the sequence, in order; the arrays may be memory-mapped.
        context: length of an example.
        unit: "bytes" or "tokens", for errors.
    Raises: ValueError if the sequence is shorter than one example.
    """

    def __init__(self, part: str, pieces: Sequence[np.ndarray], context: int, unit: str = "bytes"):
        self.pieces = [piece for piece in pieces if len(piece)]
        self.ends = np.cumsum([len(piece) for piece in self.pieces], dtype=np.int64)
        self.tokens = sum(map(len, self.pieces))
        self.context = context
        if self.tokens < context:
            raise ValueError(
                f"the {part} part of the corpus must hold at least context {unit}; got {self.tokens}, context {context}"
            )

    def __len__(self) -> int:
        return self.tokens // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        parts = list(self._between(index * self.context, (index + 1) * self.context))
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}

    def _between(self, begin: int, end: int) -> Iterator[np.ndarray]:
        number = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            piece, after = self.pieces[number], int(self.ends[number])
            start = after - len(piece)
            yield piece[begin - start : end - start]
            begin, number = after, number + 1


@dataclass
class Corpus:
    """A corpus that is split and encoded.

    Attributes:
        train, valid: the examples.
        unit: unit of the examples and of the loss, "bytes" or "tokens".
        vocabulary: number of tokens that a model must know.
        bytes_per_token: of the validation text; None if the corpus came as token ids.
        digest: SHA-256 of the corpus.
    """

    train: Blocks
    valid: Blocks
    unit: str
    vocabulary: int
    bytes_per_token: float | None
    digest: str

    def cut(self, context: int) -> Corpus:
        """Return the same corpus in examples of another length, from the same texts for training and validation."""
        train, valid = (
            Blocks(name, blocks.pieces, context, self.unit)
            for name, blocks in (("training", self.train), ("validation", self.valid))
        )
        return replace(self, train=train, valid=valid)

    def report(self, loss: float) -> str:
        """Describe a validation loss, given in nats per byte or token."""
        bits = loss / math.log(2)
        if self.unit == "bytes":
            return f"validation {loss:.4f} nats, {bits:.4f} bits per byte"
        line = f"validation {loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.2f}"
        return f"{line}, {bits / self.bytes_per_token:.4f} bits per byte" if self.bytes_per_token else line


def read_corpus(
    files: Sequence[str | Path], codec: Codec, context: int, *, column: str = "text", skip: Path | None = None
) -> Corpus:
    """Read a corpus from text files, or from one folder that `save_to_disk` of datasets wrote.

    Args:
        files: text files and folders, as in `read_texts`; or one saved dataset.
        codec: encodes the text.
        context: length of an example, in bytes or tokens.
        column: the column of a saved dataset, see `read_dataset`.
        skip: a folder to leave out.
    Raises: ValueError for a missing or too short corpus, or token ids that the tokenizer does not have; ImportError if
        datasets is needed and not installed.
    """
    limit = max(100_000, 64 * context)  # of validation text, in bytes; gives about 16 blocks of tokens
    if any(map(is_dataset, files)):
        if len(files) > 1:
            raise ValueError(f"a saved dataset must come alone; got {', '.join(map(str, files))}")
        train, valid, digest = read_dataset(files[0], codec, column, limit)
    else:
        texts = read_texts(files, skip=skip, validation_limit=limit)
        train, valid = (encode(text, codec) for text in texts)
        digest = sha256(*texts)
    unit = "tokens" if train.bytes is None else codec.unit
    train_blocks = Blocks("training", train.pieces, context, unit)
    valid_blocks = Blocks("validation", valid.pieces, context, unit)
    ratio = None if valid.bytes is None else valid.bytes / valid_blocks.tokens
    return Corpus(train_blocks, valid_blocks, unit, _vocabulary(codec, train, valid), ratio, digest)


def _vocabulary(codec: Codec, *parts: Tokens) -> int:
    if all(part.bytes is not None for part in parts):
        return codec.size
    pieces = [piece for part in parts for piece in part.pieces if len(piece)]
    low, high = min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)
    if low < 0:
        raise ValueError(f"token ids must be at least 0; got {low}")
    if codec.tokenizer is None:
        return high + 1
    if high >= codec.size:
        raise ValueError(f"token ids must be of the tokenizer, which has {codec.size}; got {high}; name the right one")
    return codec.size
