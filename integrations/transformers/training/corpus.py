"""What a model learns from: blocks of tokens, some to train on and some held out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .arrow import Stream, encode, is_dataset, read_dataset, sha256
from .codec import Codec
from .texts import read_texts


class Blocks(Dataset):
    """A stream of tokens cut into examples of `context`.

    part: what it is for, to be named in errors. pieces: the stream, which may lie on disk. unit: bytes or tokens.
    Raises: ValueError if it does not make one example.
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
    """unit: of the blocks and the loss, bytes or tokens. vocabulary: how many tokens a model must know.
    bytes_per_token: of the validation text; None if the corpus came as tokens. digest: of all of it, a SHA-256.
    """

    train: Blocks
    valid: Blocks
    unit: str
    vocabulary: int
    bytes_per_token: float | None
    digest: str

    def report(self, loss: float) -> str:
        """A validation loss, in nats for each byte or token, in words."""
        bits = loss / math.log(2)
        if self.unit == "bytes":
            return f"validation {loss:.4f} nats, {bits:.4f} bits per byte"
        line = f"validation {loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.2f}"
        return f"{line}, {bits / self.bytes_per_token:.4f} bits per byte" if self.bytes_per_token else line


def read_corpus(
    files: Sequence[str | Path], codec: Codec, context: int, *, column: str = "text", skip: Path | None = None
) -> Corpus:
    """A corpus of text files, as `read_texts`, or of one folder that `save_to_disk` of datasets wrote.

    column: of that dataset, see `read_dataset`. skip: a folder to leave out.
    Raises: ValueError for what is not there, too short or not of the tokenizer. ImportError if datasets is missing.
    """
    limit = max(100_000, 64 * context)  # bytes; of tokens, enough for some 16 blocks
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


def _vocabulary(codec: Codec, *streams: Stream) -> int:
    if all(stream.bytes is not None for stream in streams):
        return codec.size
    pieces = [piece for stream in streams for piece in stream.pieces if len(piece)]
    low, high = min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)
    if low < 0:
        raise ValueError(f"token ids must be at least 0; got {low}")
    if codec.tokenizer is None:
        return high + 1
    if high >= codec.size:
        raise ValueError(f"token ids must be of the tokenizer, which has {codec.size}; got {high}; name the right one")
    return codec.size
