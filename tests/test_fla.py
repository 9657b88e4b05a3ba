"""The backend fla: which calls it hands to flash-linear-attention, and how; a fake module stands for the library."""

import sys
import types

import oracle
import pytest
import torch

from retention import backends
from retention.backends import Call, fla
from retention.errors import BackendError

CALL = Call(
    batch=1,
    heads=4,
    kv_heads=2,
    length=6,
    key_dim=8,
    value_dim=4,
    dtype=torch.bfloat16,
    out_dtype=torch.bfloat16,
    device="cuda",
    scale=0.3,
    form="chunkwise",
)


@pytest.fixture
def library(monkeypatch):
    """flash-linear-attention with the two functions that are used; they compute the definition and keep their calls."""
    calls = []

    def named(name):
        def function(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, **rest):
            calls.append((name, g, initial_state, output_final_state, rest))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = oracle.retain(q, k, v, g_gamma, scale=scale).to(q.dtype).transpose(1, 2)
            return out, oracle.state(k, v, g_gamma, q.shape[1]) if output_final_state else None

        return function

    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla, module.fused_chunk_simple_gla = named("chunk"), named("fused_chunk")
    for name, found in (("fla", types.ModuleType("fla")), ("fla.ops", types.ModuleType("fla.ops"))):
        monkeypatch.setitem(sys.modules, name, found)
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    fla._missing.cache_clear()
    yield calls
    fla._missing.cache_clear()


def test_it_hands_on_the_call_in_the_layout_of_the_library(library):
    q, k, v = (torch.randn(1, h, 6, d, dtype=torch.bfloat16) for h, d in ((4, 8), (2, 8), (2, 4)))
    log_decay, state = torch.tensor([-0.1, -0.2, -0.3, -0.4], dtype=torch.float64), torch.randn(1, 4, 8, 4)
    assert backends.why_not(CALL, "fla") == []
    out, final = backends._backends["fla"](
        CALL._replace(return_state=True, has_state=True), q, k, v, log_decay, state, None, torch.tensor([0, 6])
    )
    ((name, g, before, wanted, rest),) = library
    assert (name, g, wanted) == ("chunk", None, True)
    assert before is state
    assert rest["cu_seqlens"].dtype == torch.int64
    torch.testing.assert_close(out.double(), oracle.retain(q, k, v, log_decay, scale=0.3), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(final.double(), oracle.state(k, v, log_decay, 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "chunk"),
        ({"batch": 32}, "fused_chunk"),
        ({"batch": 8, "value_dim": 512}, "fused_chunk"),
        ({"batch": 32, "key_dim": 256}, "chunk"),
    ],
)
def test_route(change, name, library):
    assert fla.route(CALL._replace(**change)).__qualname__.startswith("library.<locals>.named")
    x = torch.ones(1, 1, 1, 1)
    fla.route(CALL._replace(**change))(x, x, x, g_gamma=torch.zeros(1))
    assert library[0][0] == name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"form": "parallel"}, "has the form chunkwise, not parallel"),
        ({"causal": False}, "is causal"),
        ({"masked": True}, "takes no mask"),
        ({"in_place": True}, "does not overwrite a state"),
        ({"transformed": True}, "torch.func"),
        ({"dtype": torch.float32, "out_dtype": torch.float32}, "use half precision"),
        ({"out_dtype": torch.float32}, "returns torch.bfloat16, not torch.float32"),
        ({"key_dim": 258}, "key_dim up to 256, not 258 and 4"),
        ({"value_dim": 5}, "has even head dims"),
        ({"chunk_size": 64}, "chooses its chunks itself"),
        ({"device": "cpu"}, "needs a GPU, not cpu"),
    ],
)
def test_what_it_refuses(change, reason, library):
    (found,) = backends.why_not(CALL._replace(**change), "fla")
    assert reason in found


def test_a_gradient_that_the_library_does_not_compute_is_refused(library):
    x = torch.randn(1, 4, 6, 8, dtype=torch.bfloat16)
    decay = torch.zeros(4, requires_grad=True)
    with pytest.raises(BackendError, match="no gradient of log_decay; detach it, or use another backend"):
        backends._backends["fla"](CALL._replace(needs_grad=True), x, x, x, decay, None, None, None)
    assert library == []


def test_without_the_library_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    fla._missing.cache_clear()
    (reason,) = backends.why_not(CALL, "fla")
    assert "which cannot be imported" in reason
    assert reason.endswith('pip install "flash-linear-attention==0.6.0"')
    fla._missing.cache_clear()
