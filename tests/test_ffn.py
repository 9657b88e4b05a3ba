"""The feed-forward, dense and with experts, against its formula."""

import sys
import types

import pytest
import torch
from fake_xformers import fake, hide
from torch.nn import functional as F

from retention import BackendError, backends
from retention.ffn import FeedForward, MixtureOfExperts
from retention.model import RetNetBackbone


def drawn(module):
    """So that no bias is 0 and no norm's weight 1."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": True, "activation": "silu", "activate_output": True}], ids=str)
def test_dense(gated, options):
    ffn, x = drawn(FeedForward(6, 10, gated=gated, **options)), torch.randn(2, 3, 6).double()
    act = F.silu if options else F.gelu
    hidden = act(x @ ffn.fc1.weight.T + (ffn.fc1.bias if options else 0))
    if gated:
        hidden = hidden * (x @ ffn.gate.weight.T + (ffn.gate.bias if options else 0))
    want = hidden @ ffn.fc2.weight.T + (ffn.fc2.bias if options else 0)
    torch.testing.assert_close(ffn(x), act(want) if options else want)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_before_fc2(norm):
    ffn, x = drawn(FeedForward(6, 10, gated=False, hidden_norm=norm)), torch.randn(2, 3, 6).double()
    hidden = F.gelu(x @ ffn.fc1.weight.T)
    hidden = hidden - hidden.mean(-1, keepdim=True) if norm == "layer" else hidden
    hidden = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * ffn.norm.weight
    hidden = hidden + ffn.norm.bias if norm == "layer" else hidden
    torch.testing.assert_close(ffn(x), hidden @ ffn.fc2.weight.T)


def test_init_scale_makes_the_first_weights_smaller():
    ffn = FeedForward(64, 64, init_scale=0.25)
    bound = (6 / 128) ** 0.5
    for proj, scale in ((ffn.fc1, 0.25), (ffn.fc2, 0.25), (ffn.gate, 1)):
        assert proj.weight.abs().max().item() == pytest.approx(bound * scale, rel=0.02)


@pytest.mark.parametrize("top_k", [1, 2])
def test_each_token_goes_through_its_experts(top_k):
    moe, x = drawn(MixtureOfExperts(6, 10, num_experts=4, top_k=top_k)), torch.randn(2, 5, 6).double()
    out, _ = moe(x)
    for got, token in zip(out.flatten(0, 1), x.flatten(0, 1), strict=True):
        chances = (moe.router.weight @ token).softmax(0)
        best = sorted(range(4), key=lambda i: -chances[i])[:top_k]
        total = sum(chances[i] for i in best) if top_k > 1 else 1
        torch.testing.assert_close(got, sum(chances[i] / total * moe.experts[i](token) for i in best))


@pytest.mark.slow
def test_compiled_experts_give_the_same():
    moe, x = drawn(MixtureOfExperts(6, 10, num_experts=4, top_k=2)), torch.randn(2, 5, 6).double()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), moe(x), strict=True):
        torch.testing.assert_close(got, want)


def test_the_loss_of_experts_is_that_of_gshard_and_counts_real_tokens_only():
    moe, x = drawn(MixtureOfExperts(6, 10, num_experts=4, top_k=2)), torch.randn(2, 50, 6).double()
    mask = torch.arange(50) >= torch.tensor([[20], [0]])
    real = x[mask]
    chances = (real @ moe.router.weight.T).softmax(-1)
    load = torch.stack([(chances.argmax(-1) == i).double().mean() for i in range(4)])
    torch.testing.assert_close(moe(x, mask)[1], 4 * (load * chances.mean(0)).sum())
    assert moe(x)[1].item() != pytest.approx(moe(x, mask)[1].item())


def test_the_loss_of_experts_is_1_if_they_have_equal_loads_and_their_number_if_one_has_all():
    moe = MixtureOfExperts(4, 4, num_experts=4, top_k=1)
    moe.router.weight.data = 50 * torch.eye(4)
    assert moe(torch.eye(4)[None])[1].item() == pytest.approx(1)
    assert moe(torch.eye(4)[None, :1].expand(1, 9, 4))[1].item() == pytest.approx(4)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="^activation must be one of 'silu', .*; got activation 'swoosh'"):
        FeedForward(4, 4, activation="swoosh")


# --- xformers ---------------------------------------------------------------------------------------------------------

SILU = dict(activation="silu", backend="xformers")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "activate_output": True}], ids=str)
def test_xformers_swiglu_is_the_formula_and_so_are_its_gradients(options, dtype, bound):
    ffn = drawn(FeedForward(6, 10, **SILU, **options)).to(dtype)
    x = torch.randn(2, 3, 6, dtype=dtype, requires_grad=True)
    exact = [p.detach().double().requires_grad_() for p in (x, *ffn.parameters())]
    at, named = exact[0], dict(zip((name for name, _ in ffn.named_parameters()), exact[1:], strict=True))
    a, b = (at @ named[f"{name}.weight"].T + named.get(f"{name}.bias", 0) for name in ("fc1", "gate"))
    want = (a * b / (1 + (-a).exp())) @ named["fc2.weight"].T + named.get("fc2.bias", 0)
    want = want / (1 + (-want).exp()) if options else want
    found = ffn(x)
    assert found.dtype == dtype
    wanted = torch.autograd.grad(want.square().sum(), exact)
    for got, right in zip(
        (found, *torch.autograd.grad(found.square().sum(), (x, *ffn.parameters()))), (want, *wanted), strict=True
    ):
        assert (got.double() - right).abs().max() <= bound * right.abs().max()


def test_xformers_swiglu_has_the_parameters_of_the_other_and_is_asked_for(monkeypatch):
    torch.manual_seed(0)
    plain = FeedForward(6, 10, activation="silu", bias=True)
    torch.manual_seed(0)
    ffn, x = FeedForward(6, 10, bias=True, **SILU), torch.randn(2, 3, 6)
    for (name, got), (other, want) in zip(ffn.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(got, want)
    torch.testing.assert_close(ffn(x), plain(x))
    monkeypatch.setattr("xformers.ops.swiglu", lambda x, *weights, op: torch.full_like(x, 7))
    assert ffn(x).unique().tolist() == [7]
    assert plain(x).unique().numel() > 1


@pytest.mark.slow
def test_xformers_swiglu_under_autocast_and_in_one_compiled_graph():
    ffn, x = drawn(FeedForward(6, 10, **SILU)).float(), torch.randn(2, 3, 6)
    plain = FeedForward(6, 10, activation="silu")
    plain.load_state_dict(ffn.state_dict())
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    compiled(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(ffn.gate.weight.grad, plain.gate.weight.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert ffn(x).dtype == torch.bfloat16
        assert torch.equal(ffn(x), plain(x))


@pytest.mark.parametrize(
    "options", [{"gated": False}, {"activation": "gelu"}, {"hidden_norm": "rms"}, {"activation_dropout": 0.1}], ids=str
)
def test_what_xformers_swiglu_cannot_do_is_refused(options):
    with pytest.raises(ValueError, match="^backend 'xformers' computes .*; got .*; change them, or use"):
        FeedForward(6, 10, **SILU | options)


def test_xformers_swiglu_does_not_leave_out_what_an_adapter_adds_to_a_layer():
    class LoRA(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    ffn = FeedForward(6, 10, **SILU)
    ffn.gate = LoRA(6, 10)
    with pytest.raises(BackendError, match="needs an nn.Linear for gate; got gate LoRA; use the backend 'torch'"):
        ffn(torch.randn(2, 6))


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="^backend must be one of 'torch', 'xformers'; got backend 'triton'"):
        FeedForward(4, 4, backend="triton")


def test_the_backend_reaches_every_block_and_experts_refuse_it():
    model = RetNetBackbone(16, 2, 2, activation_fn="silu", ffn_backend="xformers")
    assert [block.ffn.backend for block in model.blocks] == ["xformers"] * 2
    with pytest.raises(ValueError, match="ffn_backend 'xformers' computes .*; got .*, moe_freq 2"):
        RetNetBackbone(16, 2, 2, activation_fn="silu", ffn_backend="xformers", moe_freq=2, moe_expert_count=2)


def wrong_swiglu(real):
    def swiglu(*args, op):
        return real.swiglu(*args) * 1.1

    return fake(swiglu=swiglu, SwiGLUEagerOp=None)


BROKEN_SWIGLU = {
    "missing": (lambda real: {"xformers": None}, ModuleNotFoundError, 'not installed: pip install "xformers==0.0.35"'),
    "too new": (lambda real: fake(), ImportError, "cannot import name 'SwiGLUEagerOp'.*pip install --force-reinstall"),
    "wrong": (wrong_swiglu, ArithmeticError, "its swiglu, or its gradient, is wrong.*pip install"),
}


@pytest.mark.parametrize("case", BROKEN_SWIGLU)
def test_an_unusable_swiglu_is_an_error_when_the_layer_is_built(case, unprobed):
    make, cause, message = BROKEN_SWIGLU[case]
    from xformers import ops

    hide(unprobed)
    for name, module in make(types.SimpleNamespace(swiglu=ops.swiglu)).items():
        unprobed.setitem(sys.modules, name, module)
    with pytest.raises(BackendError, match=f"(?s)xformers' swiglu cannot run on cpu: .*{message}") as error:
        FeedForward(4, 4, activation="silu", backend="xformers")
    assert isinstance(error.value.__cause__, cause)
    assert backends._backends["xformers"].cause is None, "the products are another part"
