"""The best weights that a stage of training has seen, so that no stage ends worse than it began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .saving import written_whole


class Best:
    """The trained weights of each part of a model at its lowest loss, in a file that survives a kill.

    Args:
        file: a .safetensors file.
        parts: modules by name; each is kept and restored by its own loss.
    """

    def __init__(self, file: Path, parts: Mapping[str, nn.Module]):
        self.file, self.parts = file, parts

    @property
    def losses(self) -> dict[str, float]:
        """The lowest loss of each part; empty before the first one."""
        if not self.file.is_file():
            return {}
        with safe_open(self.file, "pt") as kept:
            return json.loads(kept.metadata()["losses"])

    def forget(self) -> None:
        """Remove the file."""
        self.file.unlink(missing_ok=True)

    def offer(self, losses: Mapping[str, float]) -> None:
        """Keep the weights of the parts whose losses are lower than before."""
        before = self.losses
        better = [name for name, loss in losses.items() if loss < before.get(name, float("inf"))]
        if not better:
            return
        weights = load_file(self.file) if before else {}
        for name in better:
            weights.update({key: weight.detach().cpu().contiguous() for key, weight in self._trained(name).items()})
        lowest = {"losses": json.dumps(before | {name: losses[name] for name in better})}
        with written_whole(self.file.parent, self.file.name) as folder:
            save_file(weights, folder / self.file.name, lowest)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept weights into the parts."""
        if not self.file.is_file():
            return
        kept = load_file(self.file)
        for name in self.parts:
            for key, weight in self._trained(name).items():
                weight.copy_(kept[key])

    def _trained(self, part: str) -> dict[str, Tensor]:
        """The trained parameters of a part, under the names they have in the file."""
        return {f"{part}.{name}": p for name, p in self.parts[part].named_parameters() if p.requires_grad}
