"""`python -m retention` prints versions, devices, and the backends that can run here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import torch

from . import backends
from .call import FORMS, Call
from .version import __version__

__all__ = ["report"]

_LIBRARIES = ("torch", "einops", "triton", "xformers", "transformers", "timm")


def report() -> str:
    """Return the text that `python -m retention` prints."""
    lines = [f"multiscale-retention {__version__}, Python {platform.python_version()} on {platform.platform()}", ""]
    owners = packages_distributions().get("retention", [])
    if len(set(owners)) > 1:
        lines += [f"WARNING: several distributions own the package `retention`: {', '.join(sorted(set(owners)))}", ""]
    lines += ["libraries", *(f"  {name:<14} {_version(name)}" for name in _LIBRARIES), "", "devices"]
    devices = _devices()
    lines += [f"  {name:<14} {what}" for name, what in devices.items()]
    for device in devices:
        lines += ["", f"backends on {device}, best first"]
        for name, forms in _answers(device).items():
            lines += [f"  {name:<14} {forms}"]
            found = backends.found_by(name, device)
            lines += [] if found is None else [f"  {'':<14} found {found}"]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        name = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
        devices[accelerator.type] = f"{count} x {name}"
    return devices


def _answers(device: str) -> dict[str, str]:
    """Return for each backend the forms that run a plain call, or the reasons why none does."""
    sizes: dict[str, Any] = dict(batch=1, heads=8, kv_heads=8, length=1024, key_dim=64, value_dim=128)
    answers = {}
    for name in backends.names():
        can, cannot = [], []
        for form in FORMS:
            call = Call(**sizes, dtype=torch.float32, device=device, out_dtype=torch.float32, scale=1.0, form=form)
            reasons = backends.why_not(call, name)
            can += [form] if not reasons else []
            cannot += reasons
        answers[name] = f"runs {', '.join(can)}" if can else f"cannot run: {'; '.join(dict.fromkeys(cannot))}"
    return answers


if __name__ == "__main__":
    print(report())
