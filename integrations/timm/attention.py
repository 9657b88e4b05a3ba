"""Retention in the attention layers of timm's vision transformers.

Their own forwards run, but their calls of `scaled_dot_product_attention` return the output of retention. The layers do
not know the grid of the image, so a hook on the model's patch embedding records it at each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import timm.models.vision_transformer as vision_transformer
import torch
from timm.layers import Attention
from timm.models import register_notrace_module
from timm.models.deepseek_vit import DeepseekVitEncoder
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitEncoder
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from retention.decay import check_decay
from retention.errors import ShapeError
from retention.former import former_options
from retention.state import RetentionState

from ..swap import Adapter, Heads, HostedRetention, Swapped, register_adapter, replaced_by
from ..swap.adapter import full_name
from ..swap.retention import FORMER
from .refusals import register_refusals

__all__ = ["RetentionAttention", "TimmAttention", "Tokens", "bind", "retention_layer"]

# Their tokens are `num_prefix_tokens` prefix tokens, then the patches of `patch_embed` or `embeds`, row by row.
_HOSTS = (VisionTransformer, Eva, NaFlexVit, Qwen3VitEncoder, DeepseekVitEncoder)
_KNOWN = ", ".join(host.__name__ for host in _HOSTS)


class Tokens:
    """Records the layout of a model's tokens at each pass of its patch embedding.

    Args:
        model: one of _HOSTS.
    """

    def __init__(self, model: Any):
        self.model = model
        self.grid: tuple[int, ...] | None = None
        self.states: dict[nn.Module, RetentionState | None] | None = None  # for an image that is read in strips
        embed = model.embeds if isinstance(model, NaFlexVit) else model.patch_embed
        self.hook = embed.register_forward_hook(self._see)

    def _see(self, embed: Any, _: Any, patches: Any) -> None:
        if isinstance(patches, torch.fx.Proxy) and not embed.strict_img_size:
            raise ShapeError("a graph of FX has one grid; build the model with dynamic_img_size=False")
        if isinstance(patches, tuple):
            self.grid = patches[1]  # None for images of several sizes
        elif isinstance(patches, torch.fx.Proxy) or patches.dim() == 3:
            self.grid = embed.grid_size  # the embedding makes no other grid
        else:
            self.grid = patches.shape[1:3]

    def __call__(self, x: Tensor) -> tuple[tuple[int, int], int]:
        """Return the grid (rows, columns) and the number of prefix tokens in front of it.

        Args:
            x: (B, T, dim), all tokens.
        Raises: ShapeError if the grid is unknown or does not fit T.
        """
        prefix = self.model.num_prefix_tokens
        if self.grid is None:
            raise ShapeError("the grid of the image is not known; run the whole model, on images of one size")
        rows, columns = self.grid  # sizes, symbolic while a program for all of them is exported
        if prefix + rows * columns != x.shape[1]:
            raise ShapeError(
                f"tokens must be {prefix} and a grid of {rows} x {columns}; got {x.shape[1]} tokens; "
                "a grid has no holes, so patch dropout must be off (patch_drop_rate=0)"
            )
        return (rows, columns), prefix


class TimmAttention(Adapter):
    """Adapter for attention classes of timm that call `scaled_dot_product_attention`, in the models of _HOSTS."""

    def heads(self, attention: Any) -> Heads:
        """Return the sizes of the heads; shared keys and values count once per query head."""
        dim = (attention.qkv or attention.q_proj).in_features
        heads, size = attention.num_heads, attention.head_dim
        return Heads(dim, heads, heads, size, size)  # shared keys and values arrive repeated

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """Refuse layers outside of _HOSTS, whose grid is unknown."""
        if any(attention in set(host.modules()) for host in _hosts(model)):
            return []
        where = f"{full_name(type(attention))} stands in {type(model).__name__}"
        return [f"{where}, whose grid of tokens is not known; that of {_KNOWN} is"]

    def both_ways(self, attention: Any) -> bool:
        """Return True: tokens of an image see each other."""
        return True

    def forward(
        self,
        attention: Any,
        host_forward: Callable[..., Any],
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer's own forward on x (B, T, dim) with retention in place of its softmax.

        Raises: ValueError for attn_mask or is_causal; ShapeError if the grid is unknown or does not fit.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("retention in a vision transformer sees the whole image; got attn_mask or is_causal")
        if not hasattr(attention, "tokens"):
            raise ShapeError(f"the grid of the image is not known; the layer must stand in one of {_KNOWN}")
        states = attention.tokens.states
        if states is None:
            grid, prefix = attention.tokens(x)
            options: dict[str, Any] = dict(grid=grid, prefix=prefix)
        else:
            options = dict(state=states.get(attention), return_state=True)

        def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y, state = attention.retention(x, q, k, v, scale=attention.scale, causal=False, **options)
            if states is not None:
                states[attention] = state
            return y.transpose(1, 2)

        with _InsteadOfSoftmax(gather):
            return host_forward(x) if rope is None else host_forward(x, rope=rope)

    def attach(self, model: nn.Module) -> None:
        """Connect the replaced layers to the grid of their model."""
        for host in _hosts(model):
            bind(host, list(_swapped(host)))

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        for host in _hosts(model):
            for attention in _swapped(host):
                attention.tokens.hook.remove()
                attention.fused_attn = attention.host_fused_attn
                del attention.tokens, attention.host_fused_attn


class _InsteadOfSoftmax(TorchFunctionMode):
    """Context in which `scaled_dot_product_attention` calls `gather` instead."""

    def __init__(self, gather: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.gather = gather

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.gather(*args[:3])
        return func(*args, **(kwargs or {}))


def bind(host: Any, layers: list[Any]) -> None:
    """Connect replaced layers of a model to its grid, and let them load checkpoints without retention.

    Args:
        host: one of _HOSTS.
        layers: replaced layers of the host.
    """
    bound = (layer.tokens for layer in (*_swapped(host), *layers) if hasattr(layer, "tokens"))
    tokens = next(bound, None) or Tokens(host)
    for layer in layers:
        if not hasattr(layer, "tokens"):
            layer.tokens = tokens
            layer.host_fused_attn, layer.fused_attn = layer.fused_attn, True
            layer.retention.register_load_state_dict_pre_hook(_keep_what_is_not_there)


def _keep_what_is_not_there(retention: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep the current parameters of retention when a checkpoint of the original model has none."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + key: value for key, value in retention.state_dict().items()})


def _hosts(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, _HOSTS))


def _swapped(host: nn.Module) -> Iterator[Any]:
    return iter(replaced_by(_adapter, host).values())


_adapter = TimmAttention()


class RetentionAttention(Swapped, Attention):
    """timm's `Attention` with retention, for the attn_layer of its models; the arguments are those of timm.

    It has timm's parameters under their names, and those of its child `retention`. `retention_layer` sets options of
    retention.

    Example:
        model = timm.create_model("vit_tiny_patch16_224", attn_layer=RetentionAttention)
    """

    host, adapter = Attention, _adapter
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, dim: int, num_heads: int = 8, *, device: Any = None, dtype: Any = None, **kwargs: Any):
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.retention = HostedRetention(_adapter.heads(self), **self.options, device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Reset retention; timm calls it after it has drawn new weights for all `Linear` modules, the gate included."""
        self.retention.reset_parameters()


@former_options(FORMER)
def retention_layer(**options: Any) -> type[RetentionAttention]:
    """Return a class of attention layers with options of `HostedRetention`, for timm's attn_layer.

    Args:
        options: options of `HostedRetention`.
    Returns: a subclass of `RetentionAttention`.
    Raises: ValueError or TypeError that names the option.
    Example:
        model = timm.create_model("vit_tiny_patch16_224", attn_layer=retention_layer(gate=None))
    """
    if options.get("decay") is not None:
        check_decay(options["decay"])
    HostedRetention(Heads(8, 1, 1, 8, 8), **{**options, "decay": None, "device": "meta"})
    return type("RetentionAttention", (RetentionAttention,), {"options": options, "__module__": __name__})


def _bind_when_built(model: nn.Module, name: str, child: nn.Module | None) -> None:
    layers = list(_swapped(child)) if isinstance(model, _HOSTS) and child is not None else []
    if layers:
        bind(model, layers)


for _name in ("timm.layers.attention.Attention", "timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention"):
    register_adapter(_name, _adapter)
register_refusals()
vision_transformer.ATTN_LAYERS["retention"] = RetentionAttention
register_notrace_module(Swapped)  # type: ignore[arg-type]  # FX traces it as one node
register_module_module_registration_hook(_bind_when_built)  # an attn_layer of timm does not know its model
