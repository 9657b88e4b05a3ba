"""`Pyramid`, a four-stage vision model with the layout of RMT, for retention and for RMT's own attention.

The models are registered with timm by `pyramid_retention` and `rmt`.

Source: Fan et al. 2024, arXiv:2309.11523 (RMT: Retentive Networks Meet Vision Transformers). Differs: retention has no
    softmax, but a norm of each head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    ClNormMlpClassifierHead,
    DropPath,
    LayerNorm,
    LayerScale,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from retention.decay import HeadDecay
from retention.former import former_options
from retention.options import check_device, check_dtype, check_flags, check_rates, check_whole, is_whole, shown
from retention.rotary import frequencies, rotate, rotation_table
from retention.state import state_dtype

from ..renamed import former_names
from ..swap import Heads, HostedRetention
from ..swap.retention import FORMER

__all__ = ["SIZES", "Block", "CellHead", "ManhattanAttention", "Mixer", "Pyramid", "build_pyramid", "pyramid_cfgs"]

SIZES: dict[str, dict[str, Any]] = {
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

_HIDDEN = 1024  # width of the classifier's hidden layer

# Options of `HostedRetention` that a pyramid takes; it sets the others itself.
_OF_RETENTION = tuple(
    name
    for name in inspect.signature(HostedRetention).parameters
    if name not in ("heads", "num_decays", "decay", "device", "dtype")
)

_MOVED = {
    f"{family}_{size}": f"retention.integrations.timm.{family}:{family}_{size}"
    for family in ("pyramid_retention", "rmt")
    for size in SIZES
}
__getattr__ = former_names(__name__, _MOVED)


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
        proj_drop: dropout of the output.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        gather: nn.Module,
        *,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.freqs = num_heads, frequencies("paper", dim // num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.local = _Depthwise(dim, 5, **dd)
        self.gather = gather
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, dim) to the same shape."""
        rows, columns = x.shape[1:3]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        local = self.local(v)
        q, k, v = (z.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        turns = rotation_table(rows * columns, self.freqs, x.device, state_dtype(x.dtype))
        q, k = (rotate(z, turns) for z in (q, k))
        y, _ = self.gather(x, q, k, v, scale=q.shape[-1] ** -0.5, causal=False, grid=(rows, columns))
        return self.proj_drop(self.proj(y.flatten(2).view_as(x) + local))


class _Depthwise(nn.Conv2d):
    """A depthwise convolution of x (B, rows, columns, dim) with a kernel of size x size and zero padding."""

    def __init__(self, dim: int, size: int, **dd: Any):
        super().__init__(dim, dim, size, padding=size // 2, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, dim) to the same shape."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _ConvMlp(nn.Module):
    """Two linear layers with a GELU and a residual depthwise convolution between them, and dropout as in timm's Mlp."""

    def __init__(self, dim: int, hidden: int, drop: float, **dd: Any):
        super().__init__()
        self.fc1, self.local = nn.Linear(dim, hidden, **dd), _Depthwise(hidden, 3, **dd)
        self.fc2, self.drop = nn.Linear(hidden, dim, **dd), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, dim) to the same shape."""
        x = self.drop(F.gelu(self.fc1(x)))
        return self.drop(self.fc2(x + self.local(x)))


class Block(nn.Module):
    """A local convolution, a `Mixer` and a `_ConvMlp`, each with a residual sum; norms before the last two.

    Args:
        dim: width.
        mixer: a `Mixer`.
        mlp_ratio: hidden width of the `_ConvMlp`, relative to dim.
        drop_path: probability of dropping a branch in training.
        scaled: multiply the branches by learnt factors, 1e-6 at the start.
        proj_drop: dropout in the `_ConvMlp`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        scaled: bool,
        *,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.local = _Depthwise(dim, 3, **dd)
        self.norm1, self.mixer = LayerNorm(dim, **dd), mixer
        self.norm2, self.mlp = LayerNorm(dim, **dd), _ConvMlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.ls1, self.ls2 = (LayerScale(dim, 1e-6, **dd) if scaled else nn.Identity() for _ in range(2))
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
        dd: device and dtype of the parameters.
    """

    def __init__(self, before: int, dim: int, blocks: Sequence[nn.Module], **dd: Any):
        super().__init__()
        shrink = (nn.Conv2d(before, dim, 3, 2, 1, **dd), nn.BatchNorm2d(dim, **dd)) if before else ()
        self.downsample, self.blocks = nn.Sequential(*shrink), nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, before) to (B, rows / 2, columns / 2, dim); the first stage keeps the shape."""
        x = self.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


class CellHead(ClassifierHead):
    """RMT's classifier: a linear map, a batch norm and a swish of each cell, then the mean and a linear layer.

    Args:
        in_features: width of a cell.
        num_classes: classes; 0 for no classifier.
        hidden_size: width after the linear map.
        pool_type, drop_rate: as in timm's `ClassifierHead`.
        device, dtype: of the parameters.
    Shapes: (B, rows, columns, in_features) -> (B, num_classes).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_size: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(hidden_size, num_classes, pool_type, drop_rate, input_fmt="NHWC", **dd)
        self.pre_logits: nn.Module = _CellLayer(in_features, hidden_size, **dd)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Replace the classifier; with reset_other also remove what is before the pooling, as timm's heads do."""
        if reset_other:
            self.pre_logits = nn.Identity()
        super().reset(num_classes, pool_type, in_features=in_features, device=device, dtype=dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map cells to logits, or to the pooled hidden layer (B, hidden_size) with pre_logits."""
        return super().forward(self.pre_logits(x), pre_logits)


class _CellLayer(nn.Module):
    """A linear map, a batch norm and a swish of each cell."""

    def __init__(self, dim: int, hidden: int, **dd: Any):
        super().__init__()
        self.fc, self.norm = nn.Linear(dim, hidden, **dd), nn.BatchNorm2d(hidden, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, rows, columns, dim) to (B, rows, columns, hidden)."""
        return F.silu(self.norm(self.fc(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def _retention(dim: int, decay: list[float], options: dict[str, Any]) -> HostedRetention:
    heads, size = len(decay), dim // len(decay)
    options = {"features": False, "gate": None} | options
    return HostedRetention(Heads(dim, heads, heads, size, size), decay=decay, **options)


def _stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    """Four convolutions that reduce rows and columns to a quarter."""
    widths, layers = (in_chans, dim // 2, dim // 2, dim, dim), []
    for i, (before, after) in enumerate(pairwise(widths)):
        stride = 2 if i % 2 == 0 else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1, **dd), nn.BatchNorm2d(after, **dd), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Pyramid(nn.Module):
    """A vision model of four stages for images of any size.

    Shapes: images (B, in_chans, rows, columns) -> features (B, rows / 32, columns / 32, dims[-1]) -> logits (B,
        num_classes).
    Args:
        softmax: True for RMT's attention, False for retention.
        by_axis: the stages in which RMT's attention runs along rows and columns in turn, instead of over the whole
            image; only with softmax=True. Default: the first three.
        dims, depths, num_heads, mlp_ratios: width, blocks, heads and relative hidden width of each stage.
        spans: range of decays in each stage; head h of H has gamma = 1 - 2^(-2 - span h / H).
        scaled: whether the branches of each stage have learnt factors.
        in_chans: channels of the image.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling, as in timm's `ClassifierHead` with conv_head, else as in its `ClNormMlpClassifierHead`.
        conv_head: True: RMT's classifier, whose hidden layer comes before the pooling; see `CellHead`. False: pooling,
            a layer norm and the hidden layer.
        use_aux_head: add half of the largest logits that a second classifier gives to any cell, as models that were
            trained by token labelling do.
        feature_norms: give each stage a layer norm for its output in `forward_intermediates` and in timm's
            features_only, as RMT's detectors have.
        img_size: size of the images, which timm's `get_model_input_config` reports; other sizes work too.
        drop_rate, proj_drop_rate: dropout in the classifier, and as in timm after the linear layers of the blocks.
        drop_path_rate: probability of dropping a branch, from 0 in the first block to this value in the last.
        device, dtype: of the parameters.
        options: options of `HostedRetention`; not with softmax=True.
    Raises: TypeError or ValueError that names the option.
    """

    output_fmt = "NHWC"

    @former_options(FORMER)
    def __init__(
        self,
        *,
        softmax: bool = False,
        by_axis: tuple[bool, ...] | None = None,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        mlp_ratios: tuple[float, ...],
        spans: tuple[float, ...] = (4, 4, 6, 6),
        scaled: tuple[bool, ...] = (False, False, False, False),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        conv_head: bool = False,
        use_aux_head: bool = False,
        feature_norms: bool = False,
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ):
        check_flags(softmax=softmax, conv_head=conv_head, use_aux_head=use_aux_head, feature_norms=feature_norms)
        check_whole("in_chans", in_chans)
        check_whole("num_classes", num_classes, 0)
        check_rates(drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        check_device(device)
        check_dtype(dtype)
        _check_img_size(img_size)
        _check_options(softmax, by_axis, options)
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        by_axis = (True, True, True, False) if by_axis is None else by_axis
        self.num_classes, self.in_chans, self.use_aux_head = num_classes, in_chans, use_aux_head
        self.num_features = dims[-1]
        self.stem = _stem(in_chans, dims[0], **dd)
        stages = []
        drops: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, dim in enumerate(dims):
            heads = num_heads[i]
            decay = [math.log1p(-(2.0 ** (-2 - spans[i] * h / heads))) for h in range(heads)]
            blocks = []
            for drop in drops[i]:
                gather = ManhattanAttention(decay, by_axis[i]) if softmax else _retention(dim, decay, options | dd)
                mixer = Mixer(dim, heads, gather, proj_drop=proj_drop_rate, **dd)
                blocks.append(Block(dim, mixer, mlp_ratios[i], drop, scaled[i], proj_drop=proj_drop_rate, **dd))
            stages.append(_Stage(dims[i - 1] if i else 0, dim, blocks, **dd))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [dict(num_chs=d, reduction=4 * 2**i, module=f"stages.{i}") for i, d in enumerate(dims)]
        self.feature_norms = nn.ModuleList(nn.LayerNorm(d, **dd) for d in dims) if feature_norms else None
        if conv_head:
            self.head: Any = CellHead(dims[-1], num_classes, _HIDDEN, global_pool, drop_rate, **dd)
        else:
            self.head = ClNormMlpClassifierHead(
                dims[-1], num_classes, _HIDDEN, global_pool, drop_rate, act_layer="silu", **dd
            )
        self.head_hidden_size = self.head.num_features
        self.aux_head = self._new_aux_head()
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
        """Replace the classifier by one with `num_classes` classes; global_pool None keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features
        self.aux_head = self._new_aux_head()

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
            norm: apply the norms of the stages; only with feature_norms=True is there any.
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
                out = self.feature_norms[i](x) if norm and self.feature_norms is not None else x
                found.append(out.permute(0, 3, 1, 2).contiguous())
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one asked for, and what needs them.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: remove the norms of the stages, else only those of stages that are not asked for.
            prune_head: remove the classifier. It is removed in any case if the last stage is.
        Returns: the indices of the stages asked for.
        """
        wanted, last = feature_take_indices(len(self.stages), indices)
        shorter = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.feature_norms = None
        if self.feature_norms is not None:
            norms = (norm if i in wanted else nn.Identity() for i, norm in enumerate(self.feature_norms))
            self.feature_norms = nn.ModuleList(norms)
        if prune_head or shorter:
            self.num_features = self.feature_info[last]["num_chs"]
            self.use_aux_head = False
            self.head.reset(0, "", reset_other=True, in_features=self.num_features)
            self.reset_classifier(0)
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, rows, columns) to features (B, rows / 32, columns / 32, dim)."""
        return self.stages(self._stem_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits (B, num_classes), or to the classifier's hidden layer with pre_logits."""
        out = self.head(x, pre_logits=pre_logits)
        if self.aux_head is None or pre_logits:
            return out
        return out + 0.5 * self.aux_head(x).amax((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, rows, columns) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _stem_features(self, x: Tensor) -> Tensor:
        return self.stem(x).permute(0, 2, 3, 1)

    def _new_aux_head(self) -> nn.Linear | None:
        if not self.use_aux_head or not self.num_classes:
            return None
        return nn.Linear(self.num_features, self.num_classes, **get_device_dtype(self)).train(self.training)


def _check_img_size(size: object) -> None:
    sides: Any = (size, size) if is_whole(size) else size
    pair = isinstance(sides, tuple | list) and len(sides) == 2
    if size is None or (pair and all(is_whole(side) and side > 0 for side in sides)):
        return
    raise ValueError(f"img_size must be a number of pixels, or (rows, columns); got img_size {shown(size)}")


def _check_options(softmax: bool, by_axis: object, options: dict[str, Any]) -> None:
    """Raises: TypeError for an option that a pyramid does not have, or not with this `softmax`."""
    own = [name for name in inspect.signature(Pyramid).parameters if name != "options"]
    unknown = [name for name in options if name not in _OF_RETENTION]
    if unknown:
        more = "" if softmax else f"; those of its retention are {', '.join(_OF_RETENTION)}"
        raise TypeError(f"a Pyramid has no option {', '.join(unknown)}; its options are {', '.join(own)}{more}")
    if softmax and options:
        raise TypeError(f"RMT's attention has no options of retention; got {', '.join(options)}")
    if by_axis is None:
        return
    if not softmax:
        raise TypeError(f"by_axis is for RMT's attention, softmax=True; got by_axis {shown(by_axis)}")
    if not isinstance(by_axis, tuple | list) or len(by_axis) != 4 or any(type(x) is not bool for x in by_axis):
        raise ValueError(f"by_axis must be True or False for each of the four stages; got by_axis {shown(by_axis)}")


def pyramid_cfgs(family: str) -> Any:
    """Return timm's configurations of the models FAMILY_tiny, FAMILY_small, and so on."""
    return generate_default_cfgs(
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
            for size in SIZES
        }
    )


def build_pyramid(name: str, pretrained: bool, own: dict[str, Any], **kwargs: Any) -> Pyramid:
    """Build the model NAME as timm's entry functions do.

    Args:
        name: name of a registered model.
        pretrained: as in `timm.create_model`.
        own: options of the model; kwargs come before them.
        kwargs: options of `Pyramid` and of timm's `build_model_with_cfg`.
    """
    features: dict[str, Any] = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter")
    if kwargs.get("feature_norms"):
        features["norm"] = True
    return build_model_with_cfg(Pyramid, name, pretrained, feature_cfg=features, **{**own, **kwargs})
