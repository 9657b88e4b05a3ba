"""A text, a tokenizer made from it, and settings of small runs, for the tests of the corpus and of training."""

import math

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from retention.cli import app
from retention.integrations.transformers.training import train as training
from retention.integrations.transformers.training.settings import Settings
from retention.model import PRESETS

SMALL = dict(vocab_size=256, dim=16, num_layers=2, num_heads=2)
QUICK = ["--steps", "2", "--batch", "2", "--context", "16", "--device", "cpu"]
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


@pytest.fixture
def settings(text, monkeypatch):
    monkeypatch.setitem(PRESETS, "test", SMALL)
    return Settings(
        files=[str(text)], preset="test", steps=12, batch=2, context=32, eval_every=6, save_every=4, device="cpu"
    )


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "test", SMALL)
    return ["--preset", "test", *QUICK]


def diverge_after(step, monkeypatch, value=math.nan):
    """Let the weights break after a step, as an update that is too large does."""

    class Broken(training.Plot):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                with torch.no_grad():
                    next(model.parameters()).fill_(value)

    monkeypatch.setattr(training, "Plot", Broken)


def command(*words):
    """What `retention` prints for these words; it must go well."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output
