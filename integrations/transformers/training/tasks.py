"""Runs tasks of lm-eval, EleutherAI's evaluation harness, on models that are in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import listed

__all__ = ["find_tasks", "run_tasks"]

_INSTALL = 'pip install "multiscale-retention[eval]"'


def find_tasks(names: Sequence[str], folder: Path | None = None) -> Any:
    """Return the `TaskManager` of lm-eval that knows the tasks.

    Args:
        names: names of tasks, groups or tags; they may have stars.
        folder: a folder with YAML files of further tasks, which is searched before lm-eval's own.
    Raises: ImportError without lm-eval; ValueError if the folder or a task does not exist.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"tasks need lm-eval, which is not installed; {_INSTALL}") from error
    if folder is not None and not folder.is_dir():
        raise ValueError(f"include_path must be a folder with tasks in YAML files; got {folder}")
    # Reading the thousands of lm-eval's own files takes seconds, so that these are read only if a name asks for them.
    for defaults in (False, True) if folder is not None else (True,):
        manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    where = "lm-eval" if folder is None else f"lm-eval and {folder}"
    raise ValueError(
        f"{where} must have the tasks; unknown: {listed(unknown)}; `lm-eval ls tasks` lists those of lm-eval"
    )


def run_tasks(
    models: Mapping[str, Any], tokenizer: Any, names: Sequence[str], manager: Any, *, batch: int = 4
) -> dict[str, dict[str, float]]:
    """Return the metrics of each model by name, such as "task hellaswag, acc_norm", and their standard errors.

    Args:
        models: language models of transformers by name, all with the same tokenizer.
        tokenizer: their tokenizer.
        names: the tasks.
        manager: the result of `find_tasks`.
        batch: sequences at a time.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of models that are not opened by name
    found = {}
    for name, model in models.items():
        harnessed = HFLM(pretrained=model.eval(), backend="causal", tokenizer=tokenizer, batch_size=batch)
        outcome: Any = simple_evaluate(harnessed, tasks=list(names), task_manager=manager, log_samples=False)
        found[name] = {
            f"task {task}, {metric.removesuffix(',none')}": float(value)
            for task, metrics in outcome["results"].items()
            for metric, value in metrics.items()
            if "," in metric and isinstance(value, int | float)
        }
    return found
