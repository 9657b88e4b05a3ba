"""The RMS norm on xformers' kernel: that it is asked for, tried, and left where it cannot give what torch gives."""

import pytest
import torch

from retention import BackendError, MultiScaleRetention, RetNet, set_norm_backend
from retention.norm import HeadNorm, RMSNorm
from retention.xformers import norm

EPS = 0.1


def formula(x, weight=None, eps=EPS):
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


@pytest.fixture
def calls(unprobed):
    """The kernel is for CUDA: here it is the formula, takes CPU tensors, and notes what it is called with."""
    calls = []

    def rms_norm(x, weight, eps):
        assert x.is_contiguous()
        calls.append(x.shape)
        return formula(x.float(), weight, eps).to(x.dtype)

    unprobed.setattr("xformers.ops.rmsnorm.rms_norm", rms_norm)
    unprobed.setattr(norm, "DEVICES", ("cpu",))
    return calls


def drawn(dim=12):
    made = RMSNorm(dim, eps=EPS)
    torch.nn.init.normal_(made.weight)
    return made


def heads(affine="channel", kind="rms"):
    made = HeadNorm(3, 12, kind, affine, EPS)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@torch.no_grad()
@pytest.mark.parametrize("make", [drawn, heads])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_in_inference_the_kernel_runs_and_gives_the_formula(make, dtype, bound, calls):
    model = set_norm_backend(torch.nn.Sequential(make()), "xformers").to(dtype)
    x = torch.randn(2, 3, 5, 12, dtype=dtype).transpose(1, 2)
    calls.clear()
    found = model(x)
    assert calls == [(2, 5, 3, 12)]
    assert found.dtype == dtype
    torch.testing.assert_close(found, formula(x, model[0].weight), rtol=bound, atol=bound)


@pytest.mark.slow
def test_where_the_kernel_cannot_give_what_torch_gives_torch_runs(calls):
    model, x = set_norm_backend(drawn(), "xformers"), torch.randn(2, 5, 12)
    want = formula(x, model.weight)
    calls.clear()
    found = model(x)  # with gradients
    torch.testing.assert_close(found, want)
    assert found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), torch.nn.functional.rms_norm(x, (12,), model.weight, EPS))
        torch.testing.assert_close(model.double()(x.double()), formula(x.double(), model.weight))
        assert not norm.takes(x, model.weight)  # of another dtype
        assert not calls
        model.float()(x)
    assert len(calls) == 1, "and this test can fail"


@torch.no_grad()
def test_it_is_not_for_the_cpu(unprobed):
    model = RetNet(16, 16, 1, 2, retention={"norm": "rms"})
    with pytest.raises(BackendError, match="xformers' rms_norm runs on cuda; got a model on cpu; move it there"):
        set_norm_backend(model, "xformers")
    unprobed.setattr(norm, "rms_norm", None)
    norms = [m for m in model.modules() if isinstance(m, RMSNorm | HeadNorm)]
    assert {m.backend for m in norms} == {"torch"}
    for each in norms:
        each.backend = "xformers"  # as in a model that has come from CUDA
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 16)


@torch.no_grad()
def test_a_model_gives_the_same_and_goes_back(calls):
    model = RetNet(16, 16, 2, 2, retention={"norm": "rms"}).eval()
    names, tokens = list(model.state_dict()), torch.randint(16, (1, 9))
    want = model(tokens)
    assert set_norm_backend(model, "xformers") is model
    assert list(model.state_dict()) == names
    calls.clear()
    torch.testing.assert_close(model(tokens), want)
    assert len(calls) == 2 * 3 + 1, "two norms of each block, those of its heads, and the last one"
    calls.clear()
    assert torch.equal(set_norm_backend(model, "torch")(tokens), want)
    assert not calls


def test_a_kernel_that_is_missing_or_wrong_is_an_error_with_its_cause(calls, unprobed):
    unprobed.setattr("xformers.ops.rmsnorm.rms_norm", lambda x, weight, eps: x)
    with pytest.raises(BackendError, match="cannot run on cpu: .*its RMS norm is wrong.*pip install") as error:
        set_norm_backend(drawn(), "xformers")
    assert isinstance(error.value.__cause__, ArithmeticError)


def test_without_triton_it_is_an_error(unprobed):
    unprobed.setattr(norm, "DEVICES", ("cpu",))
    with pytest.raises(BackendError, match="cannot run on cpu: .*does not work .AssertionError") as error:
        set_norm_backend(drawn(), "xformers")
    assert isinstance(error.value.__cause__, AssertionError)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="backend must be one of 'torch', 'xformers'; got backend 'triton'"):
        set_norm_backend(drawn(), "triton")
    with pytest.raises(ValueError, match="model must have an RMS norm; got MultiScaleRetention without one"):
        set_norm_backend(MultiScaleRetention(16, 2), "torch")
    with pytest.raises(ValueError, match="got Sequential without one"):
        set_norm_backend(torch.nn.Sequential(heads(kind="group")), "torch")
