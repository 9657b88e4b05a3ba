"""xformers as it is not here: an attention operator for CPUs, and the library missing, broken or of another version."""

import sys
import types

import pytest
import torch

from retention.xformers import attention, library, probe


def fake(**names):
    """Modules `xformers`, `xformers.ops` and `xformers.sparse` that have no other names than these."""
    modules = {name: types.ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.sparse")}
    for module in modules.values():
        vars(module).update(names)
    modules["xformers"].__path__ = []
    return modules


def hide(monkeypatch):
    """As if xformers had not been imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def unprobed(monkeypatch):
    """As if xformers had never been asked for, before and after."""

    def forget():
        probe._trouble.cache_clear()
        probe._causes.clear()
        attention.why_not.cache_clear()
        library.sparse.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.fixture
def operator(unprobed):
    """An attention operator for CPUs, in xformers' own machinery of calls, checks and gradients; and what it was given.

    It is xformers' CUTLASS operator, with its demands on the memory of masks, and the formula for its kernel.
    """
    from xformers.ops import fmha

    calls = []

    def formula(inputs):
        q, k, v = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
        scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale)
        bias = inputs.attn_bias
        if bias is not None and not isinstance(bias, torch.Tensor):
            bias = bias.materialize(scores.shape, torch.float32, scores.device)
        scores = scores if bias is None else scores + bias
        return (scores.softmax(-1) @ v.float()).to(v.dtype).transpose(1, 2), scores.logsumexp(-1)

    def reasons(base):
        def not_supported_reasons(cls, inputs):
            found = base.not_supported_reasons.__func__(cls, inputs)
            fmha.cutlass._check_bias_alignment(found, inputs.attn_bias)
            return found

        return classmethod(not_supported_reasons)

    class Forward(fmha.cutlass.FwOp):
        SUPPORTED_DEVICES = frozenset({"cpu"})
        OPERATOR, NAME = formula, "cpuF"
        not_supported_reasons = reasons(fmha.AttentionFwOpBase)

        @classmethod
        def apply(cls, inputs, needs_gradient):
            calls.append(inputs)
            four = inputs
            if inputs.query.ndim == 5:
                parts = (x.flatten(2, 3) for x in (inputs.query, inputs.key, inputs.value))
                four = fmha.Inputs(*parts, attn_bias=inputs.attn_bias, scale=inputs.scale)
            out, lse = formula(four)
            return out.reshape(*inputs.query.shape[:-1], -1), fmha.Context(lse=lse, out=out) if needs_gradient else None

    class Backward(fmha.cutlass.BwOp):
        SUPPORTED_DEVICES = frozenset({"cpu"})
        OPERATOR, NAME = formula, "cpuB"
        not_supported_reasons = reasons(fmha.AttentionBwOpBase)

        @classmethod
        def apply(cls, context, inputs, grad):
            tensors = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
            with torch.enable_grad():
                out, _ = formula(fmha.Inputs(*tensors, attn_bias=inputs.attn_bias, scale=inputs.scale))
            return fmha.Gradients(*torch.autograd.grad(out, tensors, grad))

    for place in (fmha.cutlass, fmha.ck):  # with torch for CUDA or without
        unprobed.setattr(place, "FwOp", Forward)
        unprobed.setattr(place, "BwOp", Backward)
    unprobed.setattr(fmha, "ALL_FW_OPS", [Forward])
    return calls
