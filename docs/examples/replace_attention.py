"""Replace the attention of a language model, train it further, and look at what the new layers learnt.

    python docs/examples/replace_attention.py --out runs/maps
    python docs/examples/replace_attention.py --model my_model/ --text my_text.txt --layer 3

Without --model, a small Llama is trained first, on the source of Python's standard library, byte by byte. The script
then needs no download and takes about two minutes on a CPU. It draws maps.png: for each head of a layer, how much each
token (row) takes from the tokens up to it (columns), by attention, by retention as it was put in, and by retention
after training.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from retention.integrations.swap import recover, replace_attention

SHOWN = 64  # tokens of a map


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    model, tokens = pretrained(options)
    blocks = tokens[: len(tokens) // options.context * options.context].view(-1, options.context)
    valid, train = ([{"input_ids": row, "labels": row} for row in part] for part in (blocks[:16], blocks[16:]))
    text = blocks[:1, :SHOWN]
    if not options.model:
        fit(model, blocks[16:], options.steps)

    teacher = copy.deepcopy(model).eval()
    maps = {"attention": attention_maps(teacher, text, options.layer)}

    # Put retention in. The batch scales each new head to the size of its attention's output.
    report = replace_attention(model, window=options.window, calibrate_on={"input_ids": blocks[16:24]})
    print(report)
    layer = model.get_submodule(report.replaced[options.layer])
    maps["retention, before training"] = retention_maps(model, layer, text)

    # Fit the new layers to the attention that they replace, then distil the whole model from the original.
    steps = dict(transfer_steps=options.transfer_steps, tuning_steps=options.tuning_steps)
    print(recover(model, train, valid, out=options.out, teacher=teacher, use_cpu=True, **steps))
    maps["retention, after training"] = retention_maps(model, layer, text)

    with torch.inference_mode():
        lengths = 1 / -torch.expm1(layer.retention.decay(torch.device("cpu")))
    print("tokens that each decay of this layer reaches back:", ", ".join(f"{length:.0f}" for length in lengths))
    draw(maps, options.out / "maps.png")
    print(f"the maps are in {options.out / 'maps.png'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a causal language model: a folder, or a name on the hub")
    parser.add_argument("--text", type=Path, help="a text file to train on; default: Python's standard library")
    parser.add_argument("--layer", type=int, default=0, help="the layer whose maps are drawn")
    parser.add_argument("--window", type=int, help="keep exact attention for so many of the last tokens")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=400, help="steps of the small model's training")
    parser.add_argument("--transfer-steps", type=int, default=200, help="steps that fit the new layers to attention")
    parser.add_argument("--tuning-steps", type=int, default=400, help="steps that distil the whole model")
    parser.add_argument("--out", type=Path, default=Path("runs/maps"), help="folder for checkpoints and the picture")
    return parser.parse_args()


def pretrained(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model with attention, and a text as its tokens."""
    if options.text:
        text = options.text.read_text(encoding="utf-8")
    else:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        return model, AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids[0]
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    return model, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def fit(model: torch.nn.Module, blocks: torch.Tensor, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        batch = blocks[torch.randint(len(blocks), (16,))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats per token")


@torch.inference_mode()
def attention_maps(model: torch.nn.Module, text: torch.Tensor, layer: int) -> torch.Tensor:
    """(heads, length, length)."""
    model.set_attn_implementation("eager")  # the only one that returns its weights
    return model(text, output_attentions=True).attentions[layer][0]


@torch.inference_mode()
def retention_maps(model: torch.nn.Module, layer: torch.nn.Module, text: torch.Tensor) -> torch.Tensor:
    """(heads, length, length): what a layer's output is for values that are unit vectors, one for each token.

    The layer divides by the sum of its scores, so that the rows add up to 1, as those of attention do.
    """
    seen = {}

    def keep_call(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen["args"], seen["kwargs"] = args, kwargs

    def keep_output(_: torch.nn.Module, args: tuple, y: torch.Tensor) -> None:  # before gain and gate
        seen["y"] = y  # (1, length, heads, channels)

    hooks = [
        layer.retention.register_forward_pre_hook(keep_call, with_kwargs=True),
        layer.retention.norm.register_forward_hook(keep_output),
    ]
    model.eval()(text, use_cache=False)
    (x, q, k, v), kwargs = seen["args"], seen["kwargs"]
    units = torch.eye(v.shape[2]).split(v.shape[3], dim=1)  # as many at a time as a value has channels
    columns = []
    for part in units:
        values = torch.zeros_like(v)
        values[..., : part.shape[1]] = part
        layer.retention(x, q, k, values, **kwargs)
        columns.append(seen["y"][0, ..., : part.shape[1]].transpose(0, 1))
    for hook in hooks:
        hook.remove()
    return torch.cat(columns, dim=-1)


def draw(maps: dict[str, torch.Tensor], file: Path) -> None:
    heads = min(8, len(next(iter(maps.values()))))
    figure = Figure(figsize=(2.2 * heads + 1, 2.3 * len(maps) + 0.6), layout="constrained")
    grid = figure.subplots(len(maps), heads, squeeze=False)
    for row, (name, found) in zip(grid, maps.items(), strict=True):
        for axes, weights in zip(row, found, strict=False):
            image = axes.imshow(weights.clamp(min=0).sqrt().numpy(), cmap="viridis", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    for head, axes in enumerate(grid[0], start=1):
        axes.set_title(f"head {head}")
    scale = figure.colorbar(image, ax=grid, shrink=0.6, label="weight", ticks=[0, 0.1**0.5, 0.5**0.5, 1])
    scale.ax.set_yticklabels(["0", "0.1", "0.5", "1"])
    figure.suptitle("What a token (row) takes from the tokens up to it (columns)")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
