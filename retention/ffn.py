"""The feed-forward of a block: a dense one, or a mixture of experts.

Source: Sun et al. 2023, arXiv:2307.08621, Section 2.3; the gate is from Shazeer 2020, arXiv:2002.05202; the norm before
    fc2 is the Sub-LN of Wang et al. 2022, arXiv:2210.06423; the experts are those of GShard, Lepikhin et al. 2020,
    arXiv:2006.16668.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import check_input, check_mask, weight_of
from .layer import ACTIVATIONS
from .norm import BACKENDS, NORMS
from .options import (
    check_choice,
    check_device,
    check_dtype,
    check_eps,
    check_factor,
    check_flags,
    check_rates,
    check_whole,
)
from .state import state_dtype
from .xformers.swiglu import check, swiglu

__all__ = ["FeedForward", "MixtureOfExperts"]


class FeedForward(nn.Module):
    """A feed-forward of two linear layers, with or without a gate.

        fc2(norm(activation(fc1 x) * gate x)),    without a gate fc2(norm(activation(fc1 x)))

    Shapes: x (..., dim) -> (..., dim).
    Args:
        dim, hidden_dim: width of input and output, width between fc1 and fc2.
        gated: multiply by a linear layer `gate` of x.
        bias: give all linear layers a bias.
        activation: "silu", "gelu", "relu" or "sigmoid".
        activate_output: apply the activation to the output of fc2 too.
        hidden_norm: "rms" or "layer" for a norm before fc2; None: no norm.
        norm_eps: eps of that norm.
        dropout: rate of dropout of the output, in training.
        activation_dropout: rate of dropout before fc2, in training.
        init_scale: factor of the Xavier initialisation of fc1 and fc2.
        backend: "torch", or "xformers" for its `swiglu`, which computes the same from the same parameters. It needs
            gated=True, activation="silu", and neither hidden_norm nor activation_dropout.
        device, dtype: of the parameters.
    Raises: ValueError or TypeError that names the option; BackendError, from its cause, if xformers is missing or does
        not work.
    Source: Shazeer 2020, arXiv:2002.05202.
    Examples:
        >>> import torch
        >>> from retention.ffn import FeedForward
        >>> FeedForward(8, 16, activation="silu")(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        gated: bool = True,
        bias: bool = False,
        activation: str = "gelu",
        activate_output: bool = False,
        hidden_norm: str | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        init_scale: float = 1.0,
        backend: str = "torch",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_whole("dim", dim)
        check_whole("hidden_dim", hidden_dim)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("hidden_norm", hidden_norm, (*NORMS, None))
        check_choice("backend", backend, BACKENDS)
        check_flags(gated=gated, bias=bias, activate_output=activate_output)
        check_rates(dropout=dropout, activation_dropout=activation_dropout)
        check_eps("norm_eps", norm_eps)
        check_factor("init_scale", init_scale)
        check_device(device)
        check_dtype(dtype)
        if backend == "xformers":
            if not gated or activation != "silu" or hidden_norm or activation_dropout:
                raise ValueError(
                    "backend 'xformers' computes fc2(silu(fc1 x) * gate x); got a feed-forward with "
                    f"gated {gated}, activation {activation!r}, hidden_norm {hidden_norm!r}, "
                    f"activation_dropout {activation_dropout}; change them, or use backend 'torch'"
                )
            check()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.fc1 = nn.Linear(dim, hidden_dim, bias, **dd)
        self.gate = nn.Linear(dim, hidden_dim, bias, **dd) if gated else None
        self.norm = NORMS[hidden_norm](hidden_dim, eps=norm_eps, **dd) if hidden_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, dim, bias, **dd)
        self.activation, self.activate_output = ACTIVATIONS[activation], activate_output
        self.activation_dropout, self.dropout = nn.Dropout(activation_dropout), nn.Dropout(dropout)
        self.init_scale, self.backend = init_scale, backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights again (Xavier, uniform) and set biases to 0."""
        for proj in (self.fc1, self.gate, self.fc2):
            if proj is not None:
                nn.init.xavier_uniform_(proj.weight, 1.0 if proj is self.gate else self.init_scale)
                if proj.bias is not None:
                    nn.init.zeros_(proj.bias)
        if isinstance(self.norm, nn.RMSNorm | nn.LayerNorm):
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., dim) to (..., dim). Raises: ShapeError, TypeError or ValueError if x does not fit."""
        check_input("x", x, self.dim, tokens=False, weight=weight_of(self.fc1))
        if self.backend == "xformers" and self.gate is not None:
            y = swiglu(x, self.fc1, self.gate, self.fc2)
        else:
            y = self._in_torch(x)
        return self.dropout(self.activation(y) if self.activate_output else y)

    def _in_torch(self, x: Tensor) -> Tensor:
        y = self.activation(self.fc1(x))
        if self.gate is not None:
            y = y * self.gate(x)
        return self.fc2(self.norm(self.activation_dropout(y)))


class MixtureOfExperts(nn.Module):
    """A feed-forward of several experts, of which a router chooses `top_k` for each token.

        y = sum over the top_k experts e of w_e FeedForward_e(x),    w = softmax(router x)

    For top_k > 1 the weights w_e of the chosen experts are scaled to sum to 1.

    No expert has a limit of tokens, so no token is dropped, and none depends on the other tokens of its batch.

    Shapes: x (B, T, dim) -> y (B, T, dim) and a loss ().
    Args:
        dim, hidden_dim: widths of each expert, as in `FeedForward`.
        num_experts: number of experts, which have no gate.
        top_k: experts per token, at most num_experts.
        options: the further options of `FeedForward`, for each expert.
    Raises: the errors of `FeedForward`; ValueError unless 1 <= top_k <= num_experts.
    Source: Lepikhin et al. 2020, arXiv:2006.16668. Differs: experts have no capacity.
    Examples:
        >>> import torch
        >>> from retention.ffn import MixtureOfExperts
        >>> y, loss = MixtureOfExperts(8, 16, num_experts=4, top_k=2)(torch.ones(2, 3, 8))
        >>> y.shape, loss.shape
        (torch.Size([2, 3, 8]), torch.Size([]))
    """

    def __init__(self, dim: int, hidden_dim: int, *, num_experts: int, top_k: int, **options: Any):
        super().__init__()
        check_whole("dim", dim)
        check_whole("num_experts", num_experts)
        check_whole("top_k", top_k)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts; got top_k {top_k}, num_experts {num_experts}")
        dd = {name: options.get(name) for name in ("device", "dtype")}
        check_device(dd["device"])
        check_dtype(dd["dtype"])
        self.router = nn.Linear(dim, num_experts, bias=False, **dd)
        self.experts = nn.ModuleList(FeedForward(dim, hidden_dim, gated=False, **options) for _ in range(num_experts))
        self.top_k = top_k
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the router again; the experts have a method of their own."""
        nn.init.normal_(self.router.weight, std=self.router.in_features**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y (B, T, dim) and the loss that balances the experts, which is 1 if all get the same load.

            loss = num_experts * sum over e of (share of tokens with e as first choice) (mean probability of e)

        Args:
            x: (B, T, dim).
            mask: (B, T) bool, True = real token; the loss leaves padding out.
        Raises: ShapeError, TypeError or ValueError for inputs that do not fit.
        """
        check_input("x", x, self.router.in_features, weight_of(self.router))
        if mask is not None:
            check_mask(mask, x.shape[0], x.shape[1], x.device)
        tokens = x.flatten(0, 1)
        chances = self.router(tokens).softmax(-1, dtype=state_dtype(x.dtype))  # (tokens, experts)
        weights, chosen = chances.topk(self.top_k, dim=-1)  # (tokens, top_k)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        share = torch.zeros_like(chances).scatter(1, chosen, weights).to(x.dtype)  # (tokens, experts)
        out = self._all(tokens, share) if torch.compiler.is_compiling() else self._chosen(tokens, share)
        return out.view_as(x), self._imbalance(chances, chosen[:, 0], mask)

    def _chosen(self, tokens: Tensor, share: Tensor) -> Tensor:
        """Run each expert on its own tokens only."""
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = share[:, i].nonzero()[:, 0]
            out = out.index_add(0, rows, expert(tokens[rows]) * share[rows, i, None])
        return out

    def _all(self, tokens: Tensor, share: Tensor) -> Tensor:
        """Run every token through every expert, since a compiler needs shapes that do not depend on the data."""
        return sum(
            (expert(tokens) * share[:, i, None] for i, expert in enumerate(self.experts)), torch.zeros_like(tokens)
        )

    def _imbalance(self, chances: Tensor, first: Tensor, mask: Tensor | None) -> Tensor:
        """Return num_experts * sum over e of load_e mean(chances_e), over real tokens; chances (tokens, experts)."""
        real = torch.ones_like(first, dtype=torch.bool) if mask is None else mask.flatten()
        real = real[:, None].to(chances.dtype) / real.sum().clamp(min=1)
        load = (F.one_hot(first, chances.shape[1]) * real).sum(0)  # (experts,) share of tokens by first choice
        return chances.shape[1] * (load * (chances * real).sum(0)).sum()
