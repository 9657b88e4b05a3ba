"""Four-stage vision models with the layout and sizes of RMT, registered with timm.

`pyramid_retention_{tiny,small,base,large}` use bidirectional retention on the grid, linear in the number of pixels.
`rmt_{tiny,small,base,large}` use RMT's own attention, whose softmax adds the logarithm of that decay to the scores; the
first three stages apply it along rows and columns in turn, the last to the whole grid.

Source: Fan et al. 2024, arXiv:2309.11523 (RMT: Retentive Networks Meet Vision Transformers). Differs: the pyramid's
    retention has no softmax, but a norm of each head; the classifier pools before its hidden layer. There are no
    pretrained weights, and those of RMT do not load.
Example:
    import retention.integrations.timm
    model = timm.create_model("pyramid_retention_tiny", num_classes=10)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClNormMlpClassifierHead,
    DropPath,
    LayerNorm,
    LayerScale,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from retention.decay import HeadDecay
from retention.options import check_flags, check_rates, check_whole
from retention.rotary import frequencies, rotate, rotation_table
from retention.state import state_dtype

from ..swap import Heads, HostedRetention

__all__ = [
    "Block",
    "ManhattanAttention",
    "Mixer",
    "Pyramid",
    "default_cfgs",
]  # and the models, which register_model adds

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(dims=(64, 128, 256, 512), depths=(2, 2, 8, 2), num_heads=(4, 4, 8, 16), mlp_ratios=(3, 3, 3, 3)),
    "small": dict(dims=(64, 128, 256, 512), depths=(3, 4, 18, 4), num_heads=(4, 4, 8, 16), mlp_ratios=(4, 4, 3, 3)),
    "base": dict(
        dims=(80, 160, 320, 512),
        depths=(4, 8, 25, 8),
        num_heads=(5, 5, 10, 16),
        mlp_ratios=(4, 4, 3, 3),
        spans=(5, 5, 6, 6),
        scaled=(False, False, True, True),
    ),
    "large": dict(
        dims=(112, 224, 448, 640),
        depths=(4, 8, 25, 8),
        num_heads=(7, 7, 14, 20),
        mlp_ratios=(4, 4, 3, 3),
        spans=(6, 6, 6, 6),
        scaled=(False, False, True, True),
    ),
}


class ManhattanAttention(nn.Module):
    """RMT's attention, which is not retention: softmax(scale q k^T + log(gamma) (|rows| + |columns|)) v.

    Args:
        decay: log(gamma) of each head.
        by_axis: True: a softmax along each row, then one along each column; False: one over the whole grid.
    Source: Fan et al. 2024, arXiv:2309.11523.
    """

    def __init__(self, decay: list[float], by_axis: bool):
        super().__init__()
        self.decay, self.by_axis = HeadDecay(decay, len(decay)), by_axis

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, grid: tuple[int, int]
    ) -> tuple[Tensor, None]:
        """Attend on the grid; arguments as in `HostedRetention.forward`, never causal.

        Shapes: q, k, v (B, H, rows * columns, D). Returns (B, rows * columns, H, D), and None for the state.
        """
        rows, columns = (self._bias(n, q) for n in grid)
        if self.by_axis:
            q, k, v = (z.unflatten(2, grid).transpose(1, 2) for z in (q, k, v))  # (B, rows, H, columns, D)
            y = _attend_in_lines(q, k, v, columns, scale)
            q, k, y = (z.transpose(1, 3) for z in (q, k, y))  # (B, columns, H, rows, D)
            y = _attend_in_lines(q, k, y, rows, scale)
            return y.transpose(1, 3).transpose(2, 3).flatten(1, 2), None
        bias = (rows[:, :, None, :, None] + columns[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2), None

    def _bias(self, n: int, q: Tensor) -> Tensor:
        """Return log(gamma) times the distance between n cells in a line, (H, n, n)."""
        index = torch.arange(n, device=q.device)
        rate = self.decay(q.device, state_dtype(q.dtype))
        return (rate[:, None, None] * (index[:, None] - index).abs()).to(q.dtype)


def _attend_in_lines(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attend inside each line of cells: q, k, v (B, lines, H, n, D); bias (H, n, n). Returns the shape of v."""
    q, k, flat = (z.flatten(0, 1) for z in (q, k, v))  # ONNX and fused kernels take four dimensions
    return F.scaled_dot_product_attention(q, k, flat, attn_mask=bias, scale=scale).view_as(v)


@register_notrace_module
class Mixer(nn.Module):
    """Projections and rotation around retention or `ManhattanAttention`, plus a local convolution of v.

    Args:
        dim: width.
        num_heads: heads; divides dim.
        gather: a `HostedRetention` or `ManhattanAttention`.
    """

    def __init__(self, dim: int, num_heads: int, gather: nn.Module):
        super().__init__()
        self.num_heads, self.freqs = num_heads, frequencies("paper", dim // num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.local = _Depthwise(dim, 5)
        self.gather = gather
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, dim) to the same shape."""
        rows, columns = x.shape[1:3]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        local = self.local(v)
        q, k, v = (z.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        turns = rotation_table(rows * columns, self.freqs, x.device, state_dtype(x.dtype))
        q, k = (rotate(z, turns) for z in (q, k))
        y, _ = self.gather(x, q, k, v, scale=q.shape[-1] ** -0.5, causal=False, grid=(rows, columns))
        return self.proj(y.flatten(2).view_as(x) + local)


class _Depthwise(nn.Conv2d):
    """A depthwise convolution of x (B, rows, columns, dim) with a kernel of size x size and zero padding."""

    def __init__(self, dim: int, size: int):
        super().__init__(dim, dim, size, padding=size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, dim) to the same shape."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _ConvMlp(nn.Module):
    """Two linear layers with a GELU and a residual depthwise convolution between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.local, self.fc2 = nn.Linear(dim, hidden), _Depthwise(hidden, 3), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, dim) to the same shape."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.local(x))


class Block(nn.Module):
    """A local convolution, a `Mixer` and a `_ConvMlp`, each with a residual sum; norms before the last two.

    Args:
        dim: width.
        mixer: a `Mixer`.
        mlp_ratio: hidden width of the `_ConvMlp`, relative to dim.
        drop_path: probability of dropping a branch in training.
        scaled: multiply the branches by learnt factors, 1e-6 at the start.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, scaled: bool):
        super().__init__()
        self.local = _Depthwise(dim, 3)
        self.norm1, self.mixer = LayerNorm(dim), mixer
        self.norm2, self.mlp = LayerNorm(dim), _ConvMlp(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = (LayerScale(dim, 1e-6) if scaled else nn.Identity() for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, dim) to the same shape."""
        x = x + self.local(x)
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class _Stage(nn.Module):
    """A strided convolution that halves the image, except in the first stage, followed by blocks.

    Args:
        before: width before the stage; 0 in the first stage.
        dim: width of the stage.
        blocks: its blocks.
    """

    def __init__(self, before: int, dim: int, blocks: Sequence[nn.Module]):
        super().__init__()
        shrink = nn.Sequential(nn.Conv2d(before, dim, 3, 2, 1), nn.BatchNorm2d(dim)) if before else nn.Identity()
        self.downsample, self.blocks = shrink, nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, before) to (B, rows / 2, columns / 2, dim); the first stage keeps the shape."""
        x = self.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


def _retention(dim: int, decay: list[float], options: dict[str, Any]) -> HostedRetention:
    heads, size = len(decay), dim // len(decay)
    options = {"features": False, "gate": None} | options
    return HostedRetention(Heads(dim, heads, heads, size, size), decay=decay, **options)


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    """Four convolutions that reduce rows and columns to a quarter."""
    widths, layers = (in_chans, dim // 2, dim // 2, dim, dim), []
    for i, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, 2 if i % 2 == 0 else 1, 1), nn.BatchNorm2d(after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Pyramid(nn.Module):
    """A vision model of four stages for images of any size.

    Shapes: images (B, in_chans, rows, columns) -> features (B, rows / 32, columns / 32, dims[-1]) -> logits (B,
        num_classes).
    Args:
        softmax: True for RMT's attention, False for retention.
        dims, depths, num_heads, mlp_ratios: width, blocks, heads and relative hidden width of each stage.
        spans: range of decays in each stage; head h of H has gamma = 1 - 2^(-2 - span h / H).
        scaled: whether the branches of each stage have learnt factors.
        in_chans: channels of the image.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling, as in timm's `ClNormMlpClassifierHead`.
        drop_rate, drop_path_rate: dropout in the classifier; probability of dropping a branch, from 0 in the first
            block to this value in the last.
        options: options of `HostedRetention`; not with softmax=True.
    Raises: TypeError or ValueError that names the option.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        *,
        softmax: bool = False,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        mlp_ratios: tuple[float, ...],
        spans: tuple[float, ...] = (4, 4, 6, 6),
        scaled: tuple[bool, ...] = (False, False, False, False),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ):
        check_flags(softmax=softmax)
        check_whole("in_chans", in_chans)
        check_whole("num_classes", num_classes, 0)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if softmax and options:
            raise TypeError(f"RMT's attention has no options of retention; got {', '.join(options)}")
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features, self.head_hidden_size = dims[-1], 1024
        self.stem = _stem(in_chans, dims[0])
        stages = []
        drops: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, dim in enumerate(dims):
            heads = num_heads[i]
            decay = [math.log1p(-(2.0 ** (-2 - spans[i] * h / heads))) for h in range(heads)]
            blocks = []
            for drop in drops[i]:
                gather = ManhattanAttention(decay, by_axis=i < 3) if softmax else _retention(dim, decay, options)
                blocks.append(Block(dim, Mixer(dim, heads, gather), mlp_ratios[i], drop, scaled[i]))
            stages.append(_Stage(dims[i - 1] if i else 0, dim, blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [dict(num_chs=d, reduction=4 * 2**i, module=f"stages.{i}") for i, d in enumerate(dims)]
        self.head = ClNormMlpClassifierHead(
            dims[-1], num_classes, self.head_hidden_size, global_pool, drop_rate, act_layer="silu"
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, HostedRetention):
                module.reset_parameters()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter groups."""
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None)])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing of all blocks on or off."""
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one with `num_classes` classes."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the final features and the outputs of stages, each (B, dim, rows, columns).

        Args:
            x: (B, in_chans, rows, columns).
            indices: indices of stages, or the number of last stages; None for all.
            norm: ignored, as the only norm follows the pooling.
            stop_early: do not run the stages after the last one asked for.
            output_fmt: "NCHW" only.
            intermediates_only: return only the list of outputs.
        Raises: ValueError for another output_fmt.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got output_fmt {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        x, found = self._stem_features(x), []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                found.append(x.permute(0, 3, 1, 2).contiguous())
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one asked for, and the classifier if prune_head is True.

        Returns: the indices of the stages asked for.
        """
        wanted, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.head.reset(0, "", reset_other=True, in_features=self.feature_info[last]["num_chs"])
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, rows, columns) to features (B, rows / 32, columns / 32, dim)."""
        return self.stages(self._stem_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits (B, num_classes), or to the classifier's hidden layer with pre_logits."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, rows, columns) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _stem_features(self, x: Tensor) -> Tensor:
        return self.stem(x).permute(0, 2, 3, 1)


default_cfgs = generate_default_cfgs(
    {
        f"{family}_{size}": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.0",
            "classifier": "head.fc",
            "license": "mit",
        }
        for family in ("pyramid_retention", "rmt")
        for size in _SHAPES
    }
)


def _build(name: str, pretrained: bool, **kwargs: Any) -> Pyramid:
    family, _, size = name.rpartition("_")
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        Pyramid,
        name,
        pretrained,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **{**_SHAPES[size], "softmax": family == "rmt", **kwargs},
    )


@register_model
def pyramid_retention_tiny(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """Pyramid of the tiny size with retention; kwargs as in `Pyramid`."""
    return _build("pyramid_retention_tiny", pretrained, **kwargs)


@register_model
def pyramid_retention_small(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """Pyramid of the small size with retention; kwargs as in `Pyramid`."""
    return _build("pyramid_retention_small", pretrained, **kwargs)


@register_model
def pyramid_retention_base(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """Pyramid of the base size with retention; kwargs as in `Pyramid`."""
    return _build("pyramid_retention_base", pretrained, **kwargs)


@register_model
def pyramid_retention_large(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """Pyramid of the large size with retention; kwargs as in `Pyramid`."""
    return _build("pyramid_retention_large", pretrained, **kwargs)


@register_model
def rmt_tiny(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """Pyramid of the tiny size with RMT's attention; kwargs as in `Pyramid`."""
    return _build("rmt_tiny", pretrained, **kwargs)


@register_model
def rmt_small(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """Pyramid of the small size with RMT's attention; kwargs as in `Pyramid`."""
    return _build("rmt_small", pretrained, **kwargs)


@register_model
def rmt_base(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """Pyramid of the base size with RMT's attention; kwargs as in `Pyramid`."""
    return _build("rmt_base", pretrained, **kwargs)


@register_model
def rmt_large(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """Pyramid of the large size with RMT's attention; kwargs as in `Pyramid`."""
    return _build("rmt_large", pretrained, **kwargs)
