"""Trains a RetNet language model with transformers' Trainer, on one process or, under torchrun, on several."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainingArguments, default_data_collator, set_seed

from retention.layer import set_backend

from ..compat import TRAINER_STATE_NAME, TrainerState, logging
from ..modeling import RetNetForCausalLM
from .codec import Codec, load_codec
from .corpus import Corpus, read_corpus
from .progress import PLOT, Batch, Plot, Progress, SaveOnInterrupt
from .resumable import ResumableTrainer, log_every
from .saving import alone_in, check_folder, last_checkpoint, step_of, written_whole
from .settings import Settings

__all__ = ["Run", "device_arguments", "quiet", "train"]

_A_DAY = 24 * 60 * 60


@dataclass
class Run:
    """The result of a training.

    Attributes:
        model: the trained model.
        codec: encodes and decodes its text.
        corpus: its data.
        loss: validation loss, in nats per byte or token.
    """

    model: RetNetForCausalLM
    codec: Codec
    corpus: Corpus
    loss: float


def quiet() -> None:
    """Turn off the progress bars and notices of transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def train(settings: Settings, out: Path, *, resume: bool = False) -> Run:
    """Run or continue a training; write checkpoints, the model, its tokenizer and a plot of the losses to `out`.

    Args:
        settings: the settings of the run.
        out: the folder of the run.
        resume: continue from the last complete checkpoint in `out`, or start anew if there is none.
    Returns: the model and its loss.
    Raises: ValueError, ImportError or BackendError for settings that cannot run, before anything is written to `out`.
        Stopped, a KeyboardInterrupt, if Ctrl-C or another signal ends the run. FloatingPointError if the training
        diverges. NotSavedError if the disk is full.
    """
    settings.check()
    check_folder(out)
    args = _arguments(settings, out)  # sets up communication between processes
    with SaveOnInterrupt() as stop, alone_in(out) if args.process_index == 0 else nullcontext():
        return _train(settings, args, out, stop, resume)


def _train(settings: Settings, args: TrainingArguments, out: Path, stop: SaveOnInterrupt, resume: bool) -> Run:
    codec = load_codec(settings.tokenizer)
    if resume:
        settings.check_same(processes=args.world_size, vocabulary=codec.digest)
    with args.main_process_first(desc="reading the corpus"):  # the other processes read the cache
        corpus = read_corpus(settings.files, codec, settings.context, column=settings.text_column, skip=out)
    if resume:
        settings.check_same(corpus=corpus.digest)

    checkpoint = _agreed(args, out) if resume else None
    finished = checkpoint if checkpoint and step_of(checkpoint) >= settings.steps else None
    set_seed(settings.seed)
    model = _model(settings, codec, corpus, finished)
    trainer = _trainer(model, args, codec, corpus, out, stop)
    args.distributed_state.wait_for_everyone()  # nothing is written if a process failed
    if args.process_index == 0:
        found = dict(processes=args.world_size, vocabulary=codec.digest, corpus=corpus.digest, unit=corpus.unit)
        replace(settings, **found).write(out)

    if finished:
        trainer.state = TrainerState.load_from_json(str(finished / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if args.process_index == 0:
        with written_whole(out, "the model") as folder:
            trainer.save_model(str(folder))
    return Run(model, codec, corpus, trainer.evaluate()["eval_loss"])


def _agreed(args: TrainingArguments, out: Path) -> Path | None:
    """Return the checkpoint to continue from, which the first process chooses for all."""
    found = [last_checkpoint(out) if args.process_index == 0 else None]
    return broadcast_object_list(found)[0]


def _model(settings: Settings, codec: Codec, corpus: Corpus, finished: Path | None) -> RetNetForCausalLM:
    """Return a new model, or that of a finished run's last checkpoint."""
    if finished:
        model = RetNetForCausalLM.from_pretrained(finished)
    else:
        model = RetNetForCausalLM(settings.model_config(codec, corpus.vocabulary))
    if settings.gradient_checkpointing:  # transformers 5.16 has the old name only
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    set_backend(model, settings.backend, settings.form)
    with torch.no_grad():
        model(corpus.train[0]["input_ids"][None, :2])  # raises BackendError early
    return model


class _Trainer(ResumableTrainer):
    """Evaluates by cross-entropy only, while the training loss may include other terms, such as that of experts."""

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        inputs, plain = self._prepare_inputs(inputs), cast(RetNetForCausalLM, self.model)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(inputs["input_ids"], use_cache=False).logits
            loss = plain.loss_function(logits, inputs["labels"], plain.config.vocab_size)
        return loss, None, None


def _trainer(
    model: RetNetForCausalLM, args: TrainingArguments, codec: Codec, corpus: Corpus, out: Path, stop: SaveOnInterrupt
) -> ResumableTrainer:
    batch = Batch(
        args.train_batch_size, args.gradient_accumulation_steps, args.world_size, corpus.train.context, corpus.unit
    )
    return _Trainer(
        model=model,
        args=args,
        data_collator=default_data_collator,
        train_dataset=corpus.train,
        eval_dataset=corpus.valid,
        processing_class=codec.tokenizer,  # saved with the model
        callbacks=[Progress(batch, corpus), Plot(batch, out / PLOT), stop],
    )


def device_arguments(device: str, dtype: str) -> dict[str, Any]:
    """Return the arguments of `TrainingArguments` for a device and a dtype, named as in `Settings`."""
    return {
        "use_cpu": device == "cpu" or torch.accelerator.current_accelerator(check_available=True) is None,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _arguments(settings: Settings, out: Path) -> TrainingArguments:
    warmup = min(100, settings.steps // 10) if settings.warmup is None else settings.warmup
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        logging_steps=log_every(settings.steps),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        **device_arguments(settings.device, settings.dtype),
        ddp_find_unused_parameters=False,
        ddp_timeout=_A_DAY,  # seconds; the first process may tokenise for hours while the others wait
        report_to=settings.report_to,
        disable_tqdm=False,  # else a callback prints each log as well
    )
    args._n_gpu = min(1, args.n_gpu)  # one device per process; transformers would else split batches over all
    return args
