"""Loss, texts and decoding of a trained transformer before and after its attention is replaced by retention."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    set_seed,
)

from benchmarks.measure import ratio, take_turns
from benchmarks.record import show
from retention.integrations.swap import Swapped, replace_attention
from retention.integrations.transformers import RetentionCacheLayer
from retention.integrations.transformers.compat import CACHE
from retention.integrations.transformers.decoding import stream
from retention.integrations.transformers.training.codec import load_codec
from retention.integrations.transformers.training.corpus import Corpus, read_corpus
from retention.integrations.transformers.training.distill import TRANSFER, Recovery, recover
from retention.integrations.transformers.training.evaluation import without_retention
from retention.integrations.transformers.training.progress import Batch, Progress, SaveOnInterrupt
from retention.integrations.transformers.training.resumable import ResumableTrainer
from retention.integrations.transformers.training.saving import last_checkpoint, step_of
from retention.integrations.transformers.training.swapping import StageProgress
from retention.integrations.transformers.training.train import device_arguments, quiet

CONTEXT = 256
TEACHER_BATCH, BATCH = 16, 4
PROMPT, PROMPTS = 64, 64  # bytes, and how many
SCRATCH = ", from scratch"
GRAM, LOOP, PERIOD = 6, 96, 32  # bytes


def swap(
    host: Annotated[
        str, typer.Option(help="Model to train and replace: gpt2, or llama, whose heads are grouped.")
    ] = "gpt2",
    steps: Annotated[int, typer.Option(help="Number of steps of the teacher's training.")] = 5000,
    share: Annotated[
        float, typer.Option(help="Fraction of the teacher's tokens that each replaced model is trained on.")
    ] = 0.1,
    window: Annotated[
        int, typer.Option(help="Number of the last tokens that keep exact attention, in the models with a window.")
    ] = 64,
    sinks: Annotated[
        int, typer.Option(help="Number of the first tokens that keep exact attention, in all replaced models.")
    ] = 4,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints. Finished trainings in it are not repeated.")
    ] = Path("runs/benchmarks/swap"),
) -> None:
    """Train a transformer, replace all or half of its attention, without and with a window, and distil the result.

    For comparison, exact attention to the window and the sinks alone, without retention, is trained equally. The tables
    compare the losses, the generated texts and the decoding of all models.
    """
    quiet()
    corpus = read_corpus([], load_codec(""), CONTEXT)
    out, few = out / host, int(steps * share)
    teacher = new_host(host)
    losses = {"teacher": learn(teacher, corpus, steps, out / "teacher")}
    models = {"teacher": teacher.requires_grad_(False).eval()}
    steps_of = few * TEACHER_BATCH // BATCH
    recoveries: dict[str, Recovery] = {}
    kinds = ({"sinks": sinks}, {"window": window, "sinks": sinks})
    for options in kinds:
        found = both_ways(teacher, corpus, steps_of, out, options)
        models |= {name: model for name, (model, _) in found.items()}
        recoveries |= {name: recovery for name, (_, recovery) in found.items()}
        losses |= {name: recovery.tuned for name, (_, recovery) in found.items()}
        name = next(iter(found)) + SCRATCH
        models[name] = new_host(host)
        replace_attention(models[name], **options)
        losses[name] = learn(models[name], corpus, few, out / f"scratch{folder_of(options)}")

    name = f"all layers{kind_of(kinds[1])}, without retention"
    models[name], recoveries[name] = exact(teacher, corpus, steps_of, out, kinds[1])
    losses[name] = recoveries[name].tuned
    show_losses(host, losses, recoveries, steps, few)
    show_texts(host, models, corpus)
    show_decoding(host, kinds)


def both_ways(
    teacher: Any, corpus: Corpus, steps: int, out: Path, options: dict[str, Any]
) -> dict[str, tuple[Any, Recovery]]:
    """Replace all layers of the teacher, and half of them, and distil each model for `steps` steps."""
    kind, folder = kind_of(options), folder_of(options)
    transfer, tuning, taught = *stages(steps), out / f"all{folder}"
    every = with_retention(teacher, range(4), corpus, options)
    lr = 1.5e-4 if "window" in options else 3e-4  # with a window, less is left to learn
    recovery = recovered(every, teacher, corpus, transfer, tuning, lr, taught)
    half = easiest(teacher, corpus, options, taught)
    some = with_retention(teacher, half, corpus, options, taught)  # from the first stage of `every`
    return {
        f"all layers{kind}": (every, recovery),
        f"half, {half}{kind}": (some, recovered(some, teacher, corpus, 0, tuning, 1.5e-4, out / f"half{folder}")),
    }


def exact(teacher: Any, corpus: Corpus, steps: int, out: Path, options: dict[str, Any]) -> tuple[Any, Recovery]:
    """Replace all layers of the teacher by exact attention to window and sinks alone, and distil the model."""
    model = copy.deepcopy(teacher).requires_grad_(True)
    replace_attention(model, **options)  # not calibrated: exact attention is of the right size as it is
    without_retention(model)
    return model, recovered(model, teacher, corpus, *stages(steps), 1.5e-4, out / f"exact{folder_of(options)}")


def stages(steps: int) -> tuple[int, int]:
    """Return the steps of the first and of the second stage."""
    return steps * 3 // 10, steps * 7 // 10


def kind_of(options: dict[str, Any]) -> str:
    """Return the part of a model's name that tells its options."""
    return "".join(f", {name} {value}" for name, value in options.items())


def folder_of(options: dict[str, Any]) -> str:
    """Return the part of a folder's name that tells the options of its model."""
    return "".join(f"-{name}-{value}" for name, value in options.items())


def new_host(name: str, positions: int = CONTEXT) -> Any:
    """Return a new transformer of about 0.8 M parameters that reads bytes."""
    set_seed(0)
    common: dict[str, Any] = dict(vocab_size=256, bos_token_id=0, eos_token_id=0)
    if name == "gpt2":
        sizes = dict(n_embd=128, n_layer=4, n_head=4, n_positions=positions)
        return GPT2LMHeadModel(GPT2Config(**common, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    if name != "llama":
        raise typer.BadParameter(f"must be gpt2 or llama; got {name!r}", param_hint="host")
    sizes = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, max_position_embeddings=positions)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**common, **sizes, **heads, tie_word_embeddings=True))


# --- training ---------------------------------------------------------------------------------------------------------


def learn(model: Any, corpus: Corpus, steps: int, out: Path) -> float:
    """Train on the text, or continue an earlier run, and return the validation loss."""
    tenth = max(steps // 10, 1)
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=TEACHER_BATCH,
        per_device_eval_batch_size=TEACHER_BATCH,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 25,
        weight_decay=0.05,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=tenth,
        save_steps=tenth,
        save_total_limit=1,
        **common_arguments(),
    )
    batch = Batch(TEACHER_BATCH, 1, 1, CONTEXT, corpus.unit)
    with SaveOnInterrupt() as stop:
        trainer = Learner(
            model,
            args,
            train_dataset=corpus.train,
            eval_dataset=corpus.valid,
            callbacks=[Progress(batch, corpus), stop],
        )
        last = last_checkpoint(out)
        if last and step_of(last) == steps:
            trainer._load_from_checkpoint(str(last))
        else:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.evaluate()["eval_loss"]


class Learner(ResumableTrainer):
    """Evaluates by the mean loss of the predicted tokens; the Trainer's own mean counts one more token per sequence."""

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return model(**self._prepare_inputs(inputs), use_cache=False).loss, None, None


def with_retention(
    teacher: Any, layers: Iterable[int], corpus: Corpus, options: dict[str, Any], taught: Path | None = None
) -> Any:
    """Return a copy of the teacher with some layers replaced.

    Args:
        teacher: the original model.
        layers: numbers of the layers to replace.
        corpus: its first examples calibrate the layers.
        options: options of `HostedRetention`.
        taught: folder of an earlier `recover`; the layers get their weights from its first stage.
    """
    model = copy.deepcopy(teacher).requires_grad_(True)
    batch = torch.stack([corpus.train[i]["input_ids"] for i in range(8)])
    replace_attention(model, layers=layers, calibrate_on={"input_ids": batch}, **options)
    if taught:
        checkpoint: Any = last_checkpoint(taught / TRANSFER)
        weights = load_file(checkpoint / "model.safetensors")
        attention = [module for module in model.modules() if isinstance(module, Swapped)]
        for layer, module in zip(layers, attention, strict=True):
            prefix = f"layers.{layer}."
            mine = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
            module.load_state_dict(mine)
    return model


def easiest(teacher: Any, corpus: Corpus, options: dict[str, Any], taught: Path) -> list[int]:
    """Return the two layers whose replacement alone, after the first stage, raises the loss least."""
    batches = torch.stack([corpus.valid[i]["input_ids"] for i in range(0, len(corpus.valid), 4)]).split(TEACHER_BATCH)
    costs = []
    for layer in range(4):
        model = with_retention(teacher, [layer], corpus, options, taught).eval()
        with torch.no_grad():
            costs.append(sum(model(batch, labels=batch, use_cache=False).loss.item() for batch in batches))
    return sorted(sorted(range(4), key=costs.__getitem__)[:2])


def recovered(model: Any, teacher: Any, corpus: Corpus, transfer: int, tuning: int, lr: float, out: Path) -> Recovery:
    """Run both stages of `recover`: `transfer` and `tuning` steps, with learning rate `lr` in the second."""
    set_seed(0)
    eighth = max((transfer + tuning) // 8, 1)
    batch = Batch(BATCH, 1, 1, CONTEXT, corpus.unit)
    with SaveOnInterrupt() as stop:
        return recover(
            model,
            corpus.train,
            corpus.valid,
            out=out,
            teacher=teacher,
            transfer_steps=transfer,
            tuning_steps=tuning,
            transfer_lr=4e-2,
            tuning_lr=lr,
            batch=BATCH,
            callbacks=[StageProgress(batch, corpus), stop],
            eval_strategy="steps",
            eval_steps=eighth,
            save_steps=eighth,
            **common_arguments(),
        )


def common_arguments() -> dict[str, Any]:
    return dict(logging_steps=10, disable_tqdm=False, report_to="none", **device_arguments("cpu", "float32"))


def show_losses(host: str, losses: dict[str, float], recoveries: dict[str, Recovery], steps: int, few: int) -> None:
    teacher = losses["teacher"]
    rows = []
    for name, loss in losses.items():
        tokens = (steps if name == "teacher" else few) * TEACHER_BATCH * CONTEXT
        found = recoveries.get(name)
        path = f"{found.replaced:.3f}, {found.transferred:.3f}" if found else ""
        rows.append([name, f"{tokens:,}", path, f"{loss:.4f}", f"{100 * (loss / teacher - 1):+.2f} %"])
    columns = ["", "bytes trained on", "replaced, layers taught", "validation, nats per byte", "against the teacher"]
    show(f"{host}, 4 layers, width 128, context {CONTEXT}, on Python's source", columns, rows)
    for name in recoveries:
        if name.endswith("without retention"):
            continue
        most = 1.02 if name.startswith("all") else 1.01
        verdict = "met" if losses[name] <= most * teacher else "MISSED"
        typer.echo(f"{name} within {100 * most - 100:.0f} % of the teacher: {verdict}")
    for name in losses:
        if name.endswith(SCRATCH):
            same = name.removesuffix(SCRATCH)
            typer.echo(f"{same} below the same from scratch: {'met' if losses[same] < losses[name] else 'MISSED'}")


# --- what they write --------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """The sorted n-grams of the training text, and the shares of the 3-grams of the real continuations."""

    known: np.ndarray
    shares: np.ndarray


def show_texts(host: str, models: dict[str, Any], corpus: Corpus) -> None:
    blocks = torch.stack([corpus.valid[i * len(corpus.valid) // PROMPTS]["input_ids"] for i in range(PROMPTS)])
    prompts, real = blocks[:, :PROMPT], blocks[:, PROMPT:]
    text = Text(np.unique(np.concatenate([grams(piece, GRAM) for piece in corpus.train.pieces])), trigrams(real))
    rows = [["the text itself", *statistics(real, text), ""]]
    for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        written = {}
        for name, model in tqdm(models.items(), desc=f"{way} texts", leave=False):
            written[name] = write(model, prompts, temperature)
            rows.append(
                [f"{name}, {way}", *statistics(written[name], text), agreement(written[name], written["teacher"])]
            )
    columns = ["", f"{GRAM}-grams known", "3-grams, distance to the text's", "loops", "bytes as the teacher"]
    show(f"{host}: {PROMPTS} continuations of {PROMPT} bytes by {CONTEXT - PROMPT}", columns, rows)


def write(model: Any, prompts: Tensor, temperature: float) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    length = CONTEXT - prompts.shape[1]
    return torch.cat(list(stream(model.eval(), prompts, length, temperature=temperature, generator=chance)), dim=1)


def statistics(texts: Tensor, text: Text) -> list[str]:
    """Return the share of n-grams in the training text, the Jensen-Shannon distance of 3-grams, the share of loops."""
    found = np.concatenate([grams(row, GRAM) for row in texts.numpy()])
    known = np.isin(found, text.known).mean()
    mine, theirs = trigrams(texts), text.shares
    middle = (mine + theirs) / 2
    divergence = sum(_entropy(middle) - _entropy(part) for part in (mine, theirs)) / 2
    return [f"{100 * known:.1f} %", f"{divergence**0.5:.3f}", f"{100 * np.mean([loops(row) for row in texts]):.0f} %"]


def grams(text: np.ndarray, n: int) -> np.ndarray:
    """Return each n-gram of the bytes as one number."""
    windows = np.lib.stride_tricks.sliding_window_view(text.astype(np.uint64), n)
    return windows @ (np.uint64(256) ** np.arange(n, dtype=np.uint64))


def trigrams(texts: Tensor) -> np.ndarray:
    """Return the share of each of the 256^3 3-grams in the texts."""
    counts = np.bincount(np.concatenate([grams(row, 3) for row in texts.numpy()]).astype(np.int64), minlength=256**3)
    return counts / counts.sum()


def _entropy(shares: np.ndarray) -> float:
    """Return the entropy in bits."""
    some = shares[shares > 0]
    return float(-(some * np.log2(some)).sum())


def loops(row: Tensor) -> bool:
    """Tell whether the last LOOP bytes repeat with a period of at most PERIOD bytes."""
    end = row[-LOOP:]
    return any(torch.equal(end[period:], end[:-period]) for period in range(1, PERIOD + 1))


def agreement(texts: Tensor, others: Tensor) -> str:
    """Return the mean number of bytes that both texts have in common from the start."""
    same = (texts == others).cumprod(dim=1).sum(dim=1).float().mean().item()
    return f"{same:.0f}"


# --- decoding ---------------------------------------------------------------------------------------------------------


def show_decoding(
    host: str, kinds: Iterable[dict[str, Any]], context: int = 8192, batch: int = 8, rounds: int = 15
) -> None:
    """Time a decoding step after `context` tokens with and without retention; untrained weights do for that."""
    models = {"attention": new_host(host, positions=context + 1000).eval()}
    for options in kinds:
        kind = kind_of(options)
        for name, layers in (("half the layers", [0, 1]), ("all layers", None)):
            models[name + kind] = model = copy.deepcopy(models["attention"])
            replace_attention(model, layers=layers, **options)
    caches = {name: filled(model, context, batch) for name, model in models.items()}
    token = torch.zeros(batch, 1, dtype=torch.long)
    with torch.inference_mode():
        seconds = take_turns(
            {name: partial(model, token, **{CACHE: caches[name]}) for name, model in models.items()}, rounds
        )
    memory = {name: cache_size(cache) for name, cache in caches.items()}
    rows = []
    for name in models:
        middle = sorted(seconds[name])[rounds // 2]
        value, low, high = ratio(seconds["attention"], seconds[name])
        faster = f"{value:.1f} ({low:.1f} to {high:.1f})" if name != "attention" else ""
        less = f"1/{memory['attention'] / memory[name]:.0f}" if name != "attention" else ""
        rows.append([name, f"{1e3 * middle:.1f}", faster, f"{memory[name] / 1e6:.2f}", less])
    columns = ["retention in", "ms a step", "times faster (quartiles)", "MB of cache", "of attention's"]
    show(f"{host}: one more token after {context}, batch {batch}", columns, rows)


@torch.inference_mode()
def filled(model: Any, context: int, batch: int) -> DynamicCache:
    """Return a cache as after a prompt of `context` tokens; most keys and values are random, to save time."""
    cache = DynamicCache(config=model.config)
    model(torch.randint(256, (batch, 300)), **{CACHE: cache})
    for layer in cache.layers:
        if not isinstance(layer, RetentionCacheLayer):
            shape = (*layer.keys.shape[:2], context - 300, layer.keys.shape[3])
            layer.update(*torch.randn(2, *shape))
    return cache


def cache_size(cache: DynamicCache) -> int:
    """Return the size of a cache in bytes."""
    kept = (vars(x.state if isinstance(x, RetentionCacheLayer) else x).values() for x in cache.layers)
    return sum(part.nbytes for parts in kept for part in parts if isinstance(part, Tensor))
