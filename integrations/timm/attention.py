"""Retention in the attention layers of timm's vision transformers.

Their forwards run as they are, but that the softmax in them is answered by retention. What the layers cannot see, the
grid of the image, a hook on the model's patch embedding tells them at every pass.
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
from retention.state import RetentionState

from ..swap import Adapter, Heads, HostedRetention, Swapped, register_adapter, replaced_by

# Their tokens are `num_prefix_tokens`, then the patches that `patch_embed` or `embeds` makes, row by row.
HOSTS = (VisionTransformer, Eva, NaFlexVit, Qwen3VitEncoder, DeepseekVitEncoder)
KNOWN = ", ".join(host.__name__ for host in HOSTS)


class Tokens:
    """How the tokens of a model lie, as its patch embedding makes them in the pass at hand."""

    def __init__(self, model: Any):
        self.model = model
        self.grid: tuple[int, ...] | None = None
        self.states: dict[nn.Module, RetentionState | None] | None = None  # of an image that comes in strips
        embed = model.embeds if isinstance(model, NaFlexVit) else model.patch_embed
        self.hook = embed.register_forward_hook(self._see)

    def _see(self, embed: Any, _: Any, patches: Any) -> None:
        if isinstance(patches, torch.fx.Proxy) and not embed.strict_img_size:
            raise ShapeError("a graph of FX has one grid; build the model with dynamic_img_size=False")
        if isinstance(patches, tuple):
            self.grid = patches[1]  # None for images of several sizes
        elif isinstance(patches, torch.fx.Proxy) or patches.dim() == 3:
            self.grid = embed.grid_size  # the only one that it makes
        else:
            self.grid = patches.shape[1:3]

    def __call__(self, x: Tensor) -> tuple[tuple[int, int], int]:
        """The grid, and how many tokens stand before it. x (B, T, dim) are all tokens. Raises: ShapeError."""
        prefix = self.model.num_prefix_tokens
        if self.grid is None:
            raise ShapeError("the grid of the image is not known; run the whole model, on images of one size")
        rows, columns = map(int, self.grid)
        if prefix + rows * columns != x.shape[1]:
            raise ShapeError(
                f"tokens must be {prefix} and a grid of {rows} x {columns}; got {x.shape[1]} tokens; "
                "a grid has no holes, so patch dropout must be off (patch_drop_rate=0)"
            )
        return (rows, columns), prefix


class TimmAttention(Adapter):
    """Adapter for attention classes of timm that call `scaled_dot_product_attention`, in the models of HOSTS."""

    def heads(self, attention: Any) -> Heads:
        dim = (attention.qkv or attention.q_proj).in_features
        heads, size = attention.num_heads, attention.head_dim
        return Heads(dim, heads, heads, size, size)  # shared keys and values come repeated

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        if any(attention in set(host.modules()) for host in _hosts(model)):
            return []
        return [f"stands in {type(model).__name__}, whose grid of tokens is not known; it is in {KNOWN}"]

    def both_ways(self, attention: Any) -> bool:
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
        if attn_mask is not None or is_causal:
            raise ValueError("retention in a vision transformer sees the whole image; got attn_mask or is_causal")
        if not hasattr(attention, "tokens"):
            raise ShapeError(f"the grid of the image is not known; the layer must stand in one of {KNOWN}")
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
        for host in _hosts(model):
            bind(host, list(_swapped(host)))

    def detach(self, model: nn.Module) -> None:
        for host in _hosts(model):
            for attention in _swapped(host):
                attention.tokens.hook.remove()
                attention.fused_attn = attention.host_fused_attn
                del attention.tokens, attention.host_fused_attn


class _InsteadOfSoftmax(TorchFunctionMode):
    """Within it, `scaled_dot_product_attention` is `gather`."""

    def __init__(self, gather: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.gather = gather

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.gather(*args[:3])
        return func(*args, **(kwargs or {}))


def bind(host: Any, layers: list[Any]) -> None:
    """Let replaced layers of a model know its tokens, and load checkpoints from before they were replaced."""
    bound = (layer.tokens for layer in (*_swapped(host), *layers) if hasattr(layer, "tokens"))
    tokens = next(bound, None) or Tokens(host)
    for layer in layers:
        if not hasattr(layer, "tokens"):
            layer.tokens = tokens
            layer.host_fused_attn, layer.fused_attn = layer.fused_attn, True
            layer.retention.register_load_state_dict_pre_hook(_keep_what_is_not_there)


def _keep_what_is_not_there(retention: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of a model with attention has nothing for retention: it stays what it is."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + key: value for key, value in retention.state_dict().items()})


def _hosts(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, HOSTS))


def _swapped(host: nn.Module) -> Iterator[Any]:
    return iter(replaced_by(_adapter, host).values())


_adapter = TimmAttention()


class RetentionAttention(Swapped, Attention):
    """timm's `Attention` with retention, for `attn_layer` of its models. Arguments as timm's.

    The same parameters under the same names, and those of `retention`. `retention_layer` gives it options.
    """

    host, adapter = Attention, _adapter
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, dim: int, num_heads: int = 8, *, device: Any = None, dtype: Any = None, **kwargs: Any):
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.retention = HostedRetention(_adapter.heads(self), **self.options, device=device, dtype=dtype)

    def init_weights(self) -> None:
        """timm calls it after it has drawn the weights of all `Linear` anew, that of the gate too."""
        self.retention.reset_parameters()


def retention_layer(**options: Any) -> type[RetentionAttention]:
    """`RetentionAttention` with options of `HostedRetention`, for `timm.create_model(..., attn_layer=...)`.

    Raises: ValueError or TypeError that names the option.
    """
    check_decay(options.get("decay", "short"))
    HostedRetention(Heads(8, 1, 1, 8, 8), **{**options, "decay": "short", "device": "meta"})
    return type("RetentionAttention", (RetentionAttention,), {"options": options, "__module__": __name__})


def _bind_when_built(model: nn.Module, name: str, child: nn.Module | None) -> None:
    layers = list(_swapped(child)) if isinstance(model, HOSTS) and child is not None else []
    if layers:
        bind(model, layers)


class _Refused(Adapter):
    """For attention that cannot be replaced."""

    def __init__(self, reason: str):
        self.reason = reason

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        return [self.reason]


for _name in ("timm.layers.attention.Attention", "timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention"):
    register_adapter(_name, _adapter)
for _name in ("swin_transformer", "swin_transformer_v2"):
    register_adapter(
        f"timm.models.{_name}.WindowAttention", _Refused("looks at windows of a few tokens, too few to gain")
    )
register_adapter(
    vision_transformer.ParallelScalingBlock, _Refused("computes its attention inline, there is no layer to replace")
)
vision_transformer.ATTN_LAYERS["retention"] = RetentionAttention
register_notrace_module(Swapped)  # type: ignore[arg-type]  # FX takes it as one node
register_module_module_registration_hook(_bind_when_built)  # timm's attn_layer is not told of the model around it
