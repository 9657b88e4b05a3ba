"""Which code runs a call, and why; and that the tests of the numbers would notice a wrong backend."""

import re
from importlib.metadata import EntryPoint

import cases
import oracle
import pytest
import torch

import retention
from retention import BackendError, backends, explain, retain
from retention.backends import Call, chunked

SIZES = dict(batch=1, heads=2, kv_heads=2, length=99, key_dim=4, value_dim=4)
CALL = dict(SIZES, dtype=torch.float32, out_dtype=torch.float32, device="cpu", scale=0.5)


class Refusing:
    def why_not(self, call):
        return ["the moon is full", "the kettle is cold"]

    def __call__(self, *args):
        raise AssertionError("must not run")


refusing = Refusing()


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "copied"),
    [("1110 0111", False), ("1111 0110", False), ("0000 1111", False), ("1011 1110", True), ("0101 1010", True)],
)
def test_rows_are_copied_only_where_padding_lies_between_their_real_tokens(monkeypatch, mask, copied):
    seen = []

    def forward(*tensors, **options):
        seen.extend(x.untyped_storage().data_ptr() for x in tensors)
        return chunked.loop.forward(*tensors, **options)

    monkeypatch.setattr(chunked, "forward", forward)
    q, k, v = (torch.randn(2, 2, 4, 4) for _ in range(3))
    real = torch.tensor([[token == "1" for token in row] for row in mask.split()])
    out = retain(q, k, v, torch.tensor([-0.1, -0.2]), mask=real, backend="chunked", form="chunkwise")
    own = {x.untyped_storage().data_ptr() for x in (q, k, v, out)}
    assert (len(set(seen) - own) > 0) == copied


# --- the choice: no tensor needed, so no GPU either -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "backend", "name", "form"),
    [
        ({}, "auto", "chunked", "chunkwise"),
        ({"length": 1}, "auto", "eager", "parallel"),
        ({"length": 64}, "auto", "eager", "parallel"),
        ({"length": 65}, "auto", "chunked", "chunkwise"),
        ({"length": 64, "packed": True}, "auto", "chunked", "chunkwise"),
        ({"length": 64, "batch": 128}, "auto", "chunked", "chunkwise"),
        ({"length": 1, "has_state": True}, "auto", "eager", "recurrent"),
        ({"length": 1, "return_state": True}, "auto", "eager", "recurrent"),
        ({"length": 1, "causal": False}, "auto", "eager", "parallel"),
        ({"length": 197, "causal": False}, "auto", "eager", "parallel"),
        ({"length": 201, "causal": False}, "auto", "chunked", "chunkwise"),
        ({"length": 197, "causal": False, "batch": 64}, "auto", "chunked", "chunkwise"),
        ({"length": 65, "causal": False, "masked": True}, "auto", "chunked", "chunkwise"),
        ({"device": "cuda", "dtype": torch.bfloat16}, "auto", "chunked", "chunkwise"),
        ({"form": "parallel"}, "auto", "eager", "parallel"),
        ({"form": "recurrent"}, "auto", "eager", "recurrent"),
        ({}, "eager", "eager", "parallel"),
        ({"transformed": True}, "auto", "eager", "parallel"),
        ({"length": 9, "causal": False, "grid": (3, 3)}, "auto", "eager", "parallel"),
        ({"length": 625, "causal": False, "grid": (25, 25)}, "auto", "chunked", "chunkwise"),
        ({}, "xformers", "xformers", "chunkwise"),
        ({"length": 9, "causal": False, "grid": (3, 3)}, "xformers", "xformers", "parallel"),
        ({"has_state": True, "length": 1}, "xformers", "xformers", "chunkwise"),
        ({"length": 1, "in_place": True, "form": "recurrent"}, "auto", "eager", "recurrent"),
    ],
)
def test_choice(change, backend, name, form):
    chosen, call = backends.choose(Call(**{**CALL, **change}), backend)
    assert chosen is backends._backends[name]
    assert call.form == form


def test_a_named_backend_that_cannot_run_is_an_error_with_every_reason(registry):
    retention.register("moody", Refusing())
    message = "(?s)backend 'moody' cannot run retain.*length 9.*moody, chunkwise: the moon is full; the kettle is cold"
    with pytest.raises(BackendError, match=message):
        retain(*torch.randn(3, 1, 2, 9, 4), torch.zeros(2), backend="moody")


def test_if_none_can_the_error_lists_all_of_them():
    with pytest.raises(BackendError, match="(?s)no backend can run.*chunked, recurrent: .*eager, recurrent: "):
        backends.choose(Call(**CALL, form="recurrent", causal=False))


def test_a_refusing_backend_is_passed_over_by_auto(registry):
    retention.register("moody", Refusing(), before="chunked")
    assert backends.names() == ("triton", "moody", "chunked", "eager", "xformers", "fla")
    assert backends.choose(Call(**CALL))[0] is backends._backends["chunked"]


def test_registration_is_never_by_accident(registry):
    with pytest.raises(ValueError, match="unique; got name 'eager' again"):
        retention.register("eager", Refusing())
    with pytest.raises(ValueError, match="before must be one of triton, chunked, eager, xformers, fla; got before 'x'"):
        retention.register("moody", Refusing(), before="x")
    with pytest.raises(
        ValueError, match="^name must be one of triton, chunked, eager, xformers, fla; got name 'moody'"
    ):
        retention.unregister("moody")
    retention.register("moody", Refusing())
    retention.unregister("moody")
    assert backends.names() == ("triton", "chunked", "eager", "xformers", "fla")


def test_plugins_come_from_entry_points_and_a_broken_one_says_why(registry, monkeypatch):
    found = [
        EntryPoint("broken", "no_such_module_at_all:x", "retention.backends"),
        EntryPoint("incomplete", "test_backends:NotThere", "retention.backends"),
        EntryPoint("a_class", "test_backends:Refusing", "retention.backends"),
        EntryPoint("eager", "test_backends:refusing", "retention.backends"),
        EntryPoint("good", "test_backends:refusing", "retention.backends"),
    ]
    monkeypatch.setattr("retention.backends.registry.entry_points", lambda group: found)
    monkeypatch.setattr("retention.backends.registry._plugins_loaded", False)
    with pytest.warns(UserWarning, match="test_backends:refusing is not used: there is a backend 'eager' already"):
        assert backends.names() == (
            "triton",
            "chunked",
            "eager",
            "xformers",
            "fla",
            "broken",
            "incomplete",
            "a_class",
            "good",
        )
    assert "AttributeError" in backends.why_not(Call(**CALL), "incomplete")[0]
    assert "must have the why_not and __call__ of `Backend`" in backends.why_not(Call(**CALL), "a_class")[0]
    assert backends.why_not(Call(**CALL), "broken") == [
        "cannot be loaded (ModuleNotFoundError: No module named 'no_such_module_at_all')"
    ]


def test_explain_prints_every_answer():
    text = explain(*torch.zeros(3, 1, 2, 999, 4), torch.zeros(2), causal=False, decay_norm=True)
    assert re.search("chunkwise +chunked +can, and is chosen", text)
    assert re.search("chunkwise +eager +cannot: has the forms parallel and recurrent, not chunkwise", text)
    assert re.search("parallel +eager +can\n", text)
    assert re.search("recurrent +eager +cannot: the recurrent form is causal", text)


# --- the contract, and that it can fail -------------------------------------------------------------------------------

LOG_DECAY = torch.tensor([-0.05, -0.7], dtype=torch.float64)


def keeps_the_contract(backend):
    """Values at every length around a chunk border, with state and without, against the definition."""
    for length in (1, 3, 4, 5, 11):
        q, k, v = (torch.randn(1, 2, length, width, dtype=torch.float64) for width in (3, 3, 5))
        want, whole = oracle.retain(q, k, v, LOG_DECAY), oracle.state(k, v, LOG_DECAY, heads=2)
        for cut in range(length + 1):
            out_1, state = retain(*(x[:, :, :cut] for x in (q, k, v)), LOG_DECAY, return_state=True, **backend)
            rest = [x[:, :, cut:] for x in (q, k, v)]
            out_2, state = retain(*rest, LOG_DECAY, state=state, return_state=True, **backend)
            if max(cases.deviation(torch.cat([out_1, out_2], 2), want), cases.deviation(state.kv, whole)) > 1e-10:
                return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [dict(backend="chunked", chunk_size=4), dict(backend="xformers"), dict(form="parallel"), dict(form="recurrent")],
)
def test_built_in_backends_keep_the_contract(backend):
    assert keeps_the_contract(backend)


MUTANTS = {
    "ignores the state": lambda q, k, v, a, s, run: run(q, k, v, a, None if s is None else 0 * s),
    "decays 0.1 % too much": lambda q, k, v, a, s, run: run(q, k, v, a * 1.001, s),
    "returns the state it got": lambda q, k, v, a, s, run: (
        run(q, k, v, a, s)[0],
        s if s is not None else run(q, k, v, a, s)[1],
    ),
    "peeks at the next token": lambda q, k, v, a, s, run: run(q, k.roll(-1, 2), v.roll(-1, 2), a, s),
    "scales twice": lambda q, k, v, a, s, run: run(q * 3**-0.5, k, v, a, s),
    "swaps the heads": lambda q, k, v, a, s, run: run(q, k, v, a.flip(0), s),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_contract_catches_a_backend_that(mutant, registry):
    class Wrong:
        def why_not(self, call):
            return []

        def __call__(self, call, q, k, v, log_decay, state, mask, cu_seqlens):
            right = backends._backends["chunked"]
            return MUTANTS[mutant](q, k, v, log_decay, state, lambda *args: right(call, *args, None, None))

    retention.register("wrong", Wrong())
    assert not keeps_the_contract({"backend": "wrong", "form": "chunkwise"})
