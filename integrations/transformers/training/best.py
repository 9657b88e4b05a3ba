"""The best weights that a stage of training has seen, so that no stage ends worse than it began."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .saving import written_whole

__all__ = ["Best"]


class Best:
    """The trained weights of each part of a model at its lowest loss, in a file that survives a kill.

    Args:
        file: a file of torch, .pt.
        parts: modules by name; each is kept and restored by its own loss.
    """

    def __init__(self, file: Path, parts: Mapping[str, nn.Module]):
        self.file, self.parts = file, parts

    @property
    def losses(self) -> dict[str, float]:
        """The lowest loss of each part; empty before the first one."""
        return self._kept()["losses"]

    def forget(self) -> None:
        """Remove the file."""
        self.file.unlink(missing_ok=True)

    def offer(self, losses: Mapping[str, float]) -> None:
        """Keep the weights of the parts whose losses are lower than before."""
        kept = self._kept()
        better = [name for name, loss in losses.items() if loss < kept["losses"].get(name, math.inf)]
        if not better:
            return
        for name in better:
            kept["losses"][name] = losses[name]
            kept["weights"] |= {key: weight.detach().cpu() for key, weight in self._trained(name).items()}
        with written_whole(self.file.parent, self.file.name) as folder:
            torch.save(kept, folder / self.file.name)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept weights into the parts."""
        kept = self._kept()
        for name in kept["losses"]:
            for key, weight in self._trained(name).items():
                weight.copy_(kept["weights"][key])

    def _kept(self) -> dict[str, Any]:
        """Return the losses and the weights in the file, which stay on disk until they are used."""
        if not self.file.is_file():
            return {"losses": {}, "weights": {}}
        return torch.load(self.file, map_location="cpu", mmap=True, weights_only=True)

    def _trained(self, part: str) -> dict[str, Tensor]:
        """The trained parameters of a part, under the names they have in the file."""
        return {f"{part}.{name}": p for name, p in self.parts[part].named_parameters() if p.requires_grad}
