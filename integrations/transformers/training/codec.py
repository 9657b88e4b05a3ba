"""How text becomes tokens and tokens become text: by its bytes, or by a tokenizer of transformers.

A document in a text ends with a zero byte, `END`; a tokenizer has a token of its own for that.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

END = "\0"
# Names for the end of a text, for a tokenizer.json that stands alone and so does not say which it is.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class ByteCodec:
    """Text as the bytes of its UTF-8."""

    unit = "bytes"
    size = 256
    specials: dict[str, int] = {}  # noqa: RUF012
    digest = ""
    tokenizer = None
    opening = "def "

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def prompt(self, text: str) -> list[int]:
        """Its bytes; for no text, the beginning of a document."""
        return list((text or END).encode())

    def text(self, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
        """What follows the prompt, as it comes; a character that is not whole yet waits."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes([min(token, 255)]))  # a token above is no byte; nor does 255 occur in UTF-8
        yield decoder.decode(b"", final=True)


class TokenCodec:
    """Text as the tokens of a tokenizer of transformers. Raises: ValueError if it has no token to end a document."""

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
        found = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.end}
        # A pad token that also ends documents must not be the embedding's padding, which does not learn.
        if self.tokenizer.pad_token_id != self.end:
            found["pad_token_id"] = self.tokenizer.pad_token_id
        return {name: token for name, token in found.items() if token is not None}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        bare = [text.removesuffix(END) for text in texts]
        ids = self.tokenizer(bare, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [[*row, self.end] if text.endswith(END) else row for text, row in zip(texts, ids, strict=True)]

    def prompt(self, text: str) -> list[int]:
        """Its tokens; for no text, the beginning of a document."""
        return self.encode([text])[0] if text else [self.end]

    def text(self, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
        """What follows the prompt, as it comes; a character that is not whole yet waits.

        Only the last tokens are decoded again, with those before them: what a token reads as may depend on them.
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
    """name: a folder with a tokenizer, a tokenizer.json, or a name on the Hugging Face hub; "" is bytes.

    Raises: ValueError for a tokenizer that cannot be loaded or has no token to end a document.
    """
    if not name:
        return ByteCodec()
    try:
        if Path(name).is_file():
            return TokenCodec(_with_an_end(PreTrainedTokenizerFast(tokenizer_file=name)))
        return TokenCodec(_with_an_end(AutoTokenizer.from_pretrained(name)))
    except (OSError, KeyError) as error:
        raise ValueError(
            f"tokenizer must be a folder, a tokenizer.json or a name on the hub; {name!r} cannot be loaded: {error}"
        ) from error


def _with_an_end(tokenizer: Any) -> Any:
    if not tokenizer.all_special_tokens:
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        tokenizer.eos_token = next((name for name in _ENDS if name in added), None)
    return tokenizer
