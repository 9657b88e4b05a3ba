"""A text and a tokenizer made from it, for the tests of the corpus and of training."""

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SQUARES = "".join(f"{n} squared is {n * n}.\n" for n in range(2000))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(SQUARES)
    return file


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE, which can write any text, with a token that is none of it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([SQUARES], trainer)
    return made


@pytest.fixture
def tokenizer(bpe):
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where datasets keeps what it has tokenised, so that no test finds what another did."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
