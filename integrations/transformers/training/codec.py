"""Encodes text as tokens and decodes tokens as text, by bytes or by a tokenizer of transformers.

In texts, a zero byte, `END`, ends each document; a tokenizer has its own token for that.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ...files import refused

__all__ = ["END", "GGUF", "ByteCodec", "Codec", "TokenCodec", "check_gguf", "load_codec"]

END = "\0"
GGUF = ".gguf"
# Usual names of the token that ends a text; a tokenizer.json on its own does not tell which token it is.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class ByteCodec:
    """Encodes text as the bytes of its UTF-8."""

    unit = "bytes"
    size = 256
    specials: dict[str, int] = {}  # noqa: RUF012
    digest = ""
    tokenizer = None
    opening = "def "

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the bytes of each text."""
        return [list(text.encode()) for text in texts]

    def prompt(self, text: str) -> list[int]:
        """Return the bytes of a prompt; for "", the end of a document, after which a new one begins."""
        return list((text or END).encode())

    def text(self, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of `tokens` as they arrive; the bytes of an incomplete character are held back."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes([min(token, 255)]))  # a larger token is no byte; 255 is invalid in UTF-8 too
        yield decoder.decode(b"", final=True)


class TokenCodec:
    """Encodes text by a tokenizer of transformers.

    Args:
        tokenizer: a tokenizer with an eos, bos or sep token, which ends documents.
    Raises: ValueError if it has none of these.
    """

    unit = "tokens"
    opening = ""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
        known = [token for token in ends if token is not None]
        if not known:
            raise ValueError(
                "the tokenizer must have an eos token, to end documents with, or else a bos or sep token; "
                f"{tokenizer.name_or_path or 'it'} has none; set eos_token in its tokenizer_config.json"
            )
        self.end: int = known[0]
        vocabulary = tokenizer.get_vocab()
        self.size = max(vocabulary.values()) + 1
        whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(vocabulary.items()))
        self.digest = hashlib.sha256(f"{self.end} {whole}".encode()).hexdigest()

    @property
    def specials(self) -> dict[str, int]:
        """The ids of special tokens, as options of `RetNetConfig`."""
        found = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.end}
        # If the pad token also ends documents, it must be trained, and an embedding's padding is not.
        if self.tokenizer.pad_token_id != self.end:
            found["pad_token_id"] = self.tokenizer.pad_token_id
        return {name: token for name, token in found.items() if token is not None}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; a final END becomes the token that ends documents."""
        bare = [text.removesuffix(END) for text in texts]
        ids = self.tokenizer(bare, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [[*row, self.end] if text.endswith(END) else row for text, row in zip(texts, ids, strict=True)]

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt; for "", the end of a document, after which a new one begins."""
        return self.encode([text])[0] if text else [self.end]

    def text(self, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of `tokens` as they arrive; an incomplete character is held back.

        Only the last tokens are decoded again, together with those before them, on which their text may depend.
        """
        before, new = list(prompt)[-8:], list[int]()
        for token in tokens:
            new.append(token)
            text = self._added(before, new)
            if text and not text.endswith("\ufffd"):
                yield text
                before, new = new, []
        yield self._added(before, new)

    def _added(self, before: list[int], new: list[int]) -> str:
        known, whole = (
            self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in (before, before + new)
        )
        return whole[len(known) :]


Codec = ByteCodec | TokenCodec


def load_codec(name: str) -> Codec:
    """Return the codec for a tokenizer.

    Args:
        name: a folder with a tokenizer, a tokenizer.json, a GGUF file, or a name on the Hugging Face Hub; "" for bytes.
    Raises: ValueError if the tokenizer cannot be loaded or has no token to end a document; ImportError if a GGUF file
        needs gguf, which is not installed.
    """
    if not name:
        return ByteCodec()
    file = Path(name)
    if file.suffix == GGUF:
        check_gguf(file)
    try:
        if file.suffix == GGUF:
            with refused(f"{name} holds no tokenizer that transformers can read"):
                read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            return TokenCodec(_with_an_end(read))
        if file.is_file():
            return TokenCodec(_with_an_end(PreTrainedTokenizerFast(tokenizer_file=name)))
        return TokenCodec(_with_an_end(AutoTokenizer.from_pretrained(name)))
    except (OSError, KeyError) as error:
        raise ValueError(
            "tokenizer must be a folder, a tokenizer.json, a GGUF file or a name on the hub; "
            f"{name!r} cannot be loaded: {error}"
        ) from error


def check_gguf(file: Path) -> None:
    """Raises: ValueError if the file does not exist; ImportError if gguf is not installed."""
    if not file.is_file():
        raise ValueError(f"no such file: {file}")
    if find_spec("gguf") is None:
        raise ImportError(f'reading {file.name} needs gguf; pip install "multiscale-retention[gguf]"')


def _with_an_end(tokenizer: Any) -> Any:
    if not tokenizer.all_special_tokens:
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        tokenizer.eos_token = next((name for name in _ENDS if name in added), None)
    return tokenizer
