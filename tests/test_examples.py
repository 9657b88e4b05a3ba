"""The scripts of docs/examples run, on small settings and without a network."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs/examples"
SMALL = {
    "train_layers.py": ["--steps", "2", "--dim", "32", "--layers", "2", "--length", "5"],
    "vision.py": ["--epochs", "1"],
    "replace_attention.py": ["--steps", "2", "--transfer-steps", "1", "--tuning-steps", "1", "--context", "32"],
}


def run(name, monkeypatch, tmp_path, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name], *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_run():
    assert {file.name for file in EXAMPLES.glob("*.py")} == SMALL.keys()


@pytest.mark.slow
def test_layers_are_trained_and_write_what_one_pass_would(monkeypatch, tmp_path, capsys):
    text = run("train_layers.py", monkeypatch, tmp_path, capsys)
    difference = re.search(r"token by token: (\S+)", text)
    assert difference is not None
    assert float(difference[1]) < 1e-4
    assert "\ndef " in text


@pytest.mark.slow
def test_a_vision_transformer_is_trained_replaced_and_trained_on(monkeypatch, tmp_path, capsys):
    text = run("vision.py", monkeypatch, tmp_path, capsys)
    assert "retention in 4 layers" in text
    assert len(re.findall(r"\d+\.\d %", text)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("window", [(), ("--window", "8")], ids=["retention", "window"])
def test_attention_is_replaced_and_maps_are_drawn(monkeypatch, tmp_path, capsys, window):
    text = run("replace_attention.py", monkeypatch, tmp_path, capsys, *window)
    assert "retention in 2 layers" in text
    assert (tmp_path / "runs/maps/maps.png").stat().st_size > 10_000


def test_maps_are_the_weights_of_the_values():
    """Rows add up to 1, and times the values they give what the layer gathers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from retention.integrations.swap import replace_attention

    example = runpy.run_path(str(EXAMPLES / "replace_attention.py"))
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()
    report = replace_attention(model)
    layer, seen = model.get_submodule(report.replaced[0]), {}
    layer.retention.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(v=args[3], y=out[0]), with_kwargs=True
    )
    maps = example["retention_maps"](model, layer, torch.randint(256, (1, 20)))
    assert torch.allclose(maps.sum(-1), torch.ones(2, 20), atol=1e-5)
    assert not maps.triu(1).any()
    assert torch.allclose((maps @ seen["v"][0]).transpose(0, 1), seen["y"][0], atol=1e-5)  # gain and gate begin at 1
