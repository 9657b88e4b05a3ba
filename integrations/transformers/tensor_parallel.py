"""Tensor parallel by transformers, `from_pretrained(..., tp_plan="auto")`: plans of RetNet and of replaced layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from retention.heads import divide_heads, divide_parameter

from ..swap.retention import HostedRetention
from .compat import ALL_PARALLEL_STYLES, TensorParallelLayer

__all__ = ["plan_of_replaced", "plan_of_retnet"]

_HEADS = "retention_heads"  # the name of the style
# The styles of projections and norms that leave each process whole heads of q, k and v.
_BY_HEAD = {"colwise", "rowwise", "replicated_with_grad_allreduce"}


class _Heads(TensorParallelLayer):
    """Parallel style of a retention layer, its decay, norm and feature maps: each process has its own heads."""

    def shard_param(self, module: Any, param: str, mesh: DeviceMesh) -> None:
        if module._parameters.get(param) is not None:
            divide_parameter(module, param, mesh, src_data_rank=None)

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, HostedRetention):
            module.divide_heads(mesh.size())
        divide_heads(module, mesh)
        return module


ALL_PARALLEL_STYLES.register(_HEADS, _Heads())  # type: ignore[arg-type]


def plan_of_retnet(config: Any) -> dict[str, str]:
    """Return the plan of a `RetNetModel`, as transformers' `base_model_tp_plan`."""
    layer, ffn = "backbone.blocks.*.retention", "backbone.blocks.*.ffn"
    options = config.retention or {}
    inward = [f"{layer}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    outward = [f"{layer}.out_proj"]
    if options.get("gate", "silu"):
        inward.append(f"{layer}.g_proj")
    if config.ffn_backend == "torch" and not config.subln:  # a norm inside needs all channels
        dense = config.moe_every != 1
        inward += [f"{ffn}.{name}" for name in ("fc1", "gate") if dense and (name == "fc1" or config.gated)]
        inward += [f"{ffn}.experts.*.fc1"] * bool(config.moe_every)
        outward += [f"{ffn}.fc2"] * dense + [f"{ffn}.experts.*.fc2"] * bool(config.moe_every)
    heads = [layer, f"{layer}.decay"]
    if options.get("norm_affine") and options.get("norm", "group"):
        heads.append(f"{layer}.norm")
    embedding = {"embed_tokens": "embedding_rowwise"} if config.vocab_size else {}
    plan = dict.fromkeys(heads, _HEADS) | dict.fromkeys(inward, "colwise") | dict.fromkeys(outward, "rowwise")
    return embedding | plan


def plan_of_replaced(layer: str, retention: HostedRetention, plan: dict[str, str]) -> dict[str, str]:
    """Return the entries of a replaced layer for the plan of its model; none if the plan leaves its heads whole.

    Args:
        layer: the name of the layer in the plan, with * for numbers.
        retention: that of the layer.
        plan: the plan of the model as it was before.
    """
    styles = {style for name, style in plan.items() if name.startswith(f"{layer}.")}
    if "colwise" not in styles or not styles <= _BY_HEAD:
        return {}
    name = f"{layer}.retention"
    heads = [name, f"{name}.decay", *(f"{name}.{child}" for child in ("q_map", "k_map") if retention.features)]
    linear = [f"{name}.{child}" for child in ("rest", "gate") if getattr(retention, child) is not None]
    return dict.fromkeys(heads, _HEADS) | dict.fromkeys(linear, "colwise")
