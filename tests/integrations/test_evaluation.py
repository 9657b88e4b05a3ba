"""Models are judged side by side on tests that are made from held-out text."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from retention.cli import app
from retention.integrations.swap import replace_attention, restore_attention
from retention.integrations.transformers.training import evaluation
from retention.integrations.transformers.training.evaluation import judge, make_items, table, without_retention

SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_attention_heads=4, initializer_range=0.3)


@pytest.fixture
def teacher():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, max_position_embeddings=200)).eval()


@pytest.fixture
def blocks():
    chance = torch.Generator().manual_seed(0)
    return [{"input_ids": row} for row in torch.randint(50, (6, 80), generator=chance)]


class Oracle(torch.nn.Module):
    """Predicts the token that followed the last place with the same two tokens; else token 0."""

    def __init__(self, config):
        super().__init__()
        self.config, self.device = config, torch.device("cpu")

    def forward(self, ids, use_cache=False):
        logits = torch.zeros(*ids.shape, 50)
        logits[..., 0] = 1
        for row, out in zip(ids, logits, strict=True):
            last = {}
            for i in range(1, len(row)):
                pair = (int(row[i - 1]), int(row[i]))
                if pair in last:
                    out[i, row[last[pair] + 1]] = 9
                last[pair] = i
        return type("Output", (), {"logits": logits})


def test_the_tests_can_be_solved_by_remembering_what_came_before(teacher, blocks, monkeypatch):
    monkeypatch.setattr(evaluation, "stream", lambda model, ids, new, temperature: [ids[:, :1].repeat(1, new)])
    items = make_items(blocks, 6)
    assert items.needles.shape == items.copies.shape == items.text.shape
    found = judge({"oracle": Oracle(teacher.config)}, items, hidden=True)["oracle"]
    assert found.values["right, copy"] > 0.9
    assert found.values["right, needle"] > 0.7
    assert found.values["right, text"] < 0.1
    assert found.values["loops"] == 1


@pytest.mark.slow
def test_a_model_is_as_good_as_itself_and_its_values_are_what_it_computes(teacher, blocks):
    items = make_items(blocks, 4)
    found = judge({"teacher": teacher, "same": copy.deepcopy(teacher)}, items, teacher="teacher", hidden=True)
    values = found["same"].values
    assert values["next token as the teacher's"] == 1
    assert values["tokens written as the teacher"] == 48
    assert [values[f"wins or ties, {name}"] for name in ("text", "copy", "needle")] == [1, 1, 1]
    ids = torch.stack([block["input_ids"] for block in blocks[:4]])
    assert values["loss"] == pytest.approx(teacher(ids, labels=ids).loss.item(), rel=1e-5)
    logits = teacher(ids).logits[:, 59:79].transpose(1, 2)
    last = torch.nn.functional.cross_entropy(logits, ids[:, 60:]).item()
    assert values["loss, tokens 60 to 79"] == pytest.approx(last, rel=1e-5)
    written = teacher.generate(items.prompts, max_new_tokens=48, do_sample=False, eos_token_id=None)[:, 20:]
    assert torch.equal(found["teacher"].written, written)
    lines = table(found).splitlines()
    assert lines[0].split() == ["teacher", "same"]
    assert lines[1].split() == ["loss", f"{values['loss']:.4f}", f"{values['loss']:.4f}"]


def test_a_silenced_layer_is_exact_attention_to_window_and_sinks_and_trains_nothing_of_retention(teacher):
    ids = torch.randint(50, (2, 40))
    replace_attention(teacher, window=8, sinks=2)
    without_retention(teacher)
    logits = teacher(ids, use_cache=False).logits
    seen = torch.ones(40, 40).tril().bool()
    seen &= (torch.arange(40)[:, None] - torch.arange(40) < 8) | (torch.arange(40) < 2)
    logits.sum().backward()
    for name, p in teacher.named_parameters():
        if ".q_map" in name or ".k_map" in name or ".decay" in name or ".rest" in name:
            assert p.grad is None or not p.grad.any(), name
    restore_attention(teacher)
    wanted = teacher(ids, attention_mask=seen[None, None].expand(2, 1, 40, 40), use_cache=False).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_layers_without_exact_attention_cannot_be_silenced(teacher):
    replace_attention(teacher)
    with pytest.raises(ValueError, match="without retention, a layer needs a window or sinks"):
        without_retention(teacher)


def test_too_little_text_is_refused(blocks):
    with pytest.raises(ValueError, match="at least 2 sequences of 64 tokens of held-out text; got 1 of 80"):
        make_items(blocks[:1], 4)


@pytest.mark.slow
def test_the_command_shows_teacher_exact_attention_and_model_side_by_side(text, tmp_path):
    config = LlamaConfig(**SIZES | {"vocab_size": 256}, num_hidden_layers=2, max_position_embeddings=128)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "teacher")
    replace_attention(model, layers=[0], window=8, sinks=2)
    model.save_pretrained(tmp_path / "student")
    words = ["evaluate", tmp_path / "student", text, "--teacher", tmp_path / "teacher"]
    words += ["--context", 64, "--items", 4, "--device", "cpu", "--json", tmp_path / "found.json"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    names = [str(tmp_path / "teacher"), "window and sinks alone", str(tmp_path / "student")]
    assert list(found) == names
    alone, student = found[names[1]], found[names[2]]
    assert alone["loss, tokens 1 to 15"] != student["loss, tokens 1 to 15"]  # position 8 on, without retention
    assert student["wins or ties, text"] <= 1
    assert f"{student['loss']:.4f}" in result.output
    refused = CliRunner().invoke(app, ["evaluate", str(tmp_path / "nowhere")])
    assert refused.exit_code == 2
    assert "model must be a folder, a GGUF file or a name on the hub" in refused.output
