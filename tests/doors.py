"""Doors of the package, what they take and what they must refuse; for tests of arguments.

A `Door` is a function with arguments that it takes, and for each argument what it must refuse: by a ValueError or
TypeError that names the argument, before any product of matrices.
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from retention import RetentionState

B, T, DIM, HEADS, VOCAB = 2, 6, 16, 2, 11

# What no argument of a kind may be. A tensor or a list stands for things of another kind altogether.
FLAG = ["no", 1, 0, None, 1.0, [True], torch.tensor(True)]
WHOLE = [True, 0, -1, 1.5, 2.0, "2", None, math.nan, [2], torch.tensor(2)]
COUNT = [x for x in WHOLE if x != 0 or x is True]  # 0 is one
MAYBE_WHOLE = [x for x in WHOLE if x is not None]
RATE = [True, -0.1, 1.0, 1.5, math.nan, math.inf, "0.1", None, [0.1], 10**400]
EPS = [True, -1e-6, math.nan, math.inf, "1e-6", None, [1e-6], 10**400]
FACTOR = [*EPS, 0, 0.0]
SCALE = [True, math.nan, -math.inf, "1", [1.0], torch.tensor(1.0), 10**400]
NAME = ["", "no such", 0, True, ["auto"], {}, torch.zeros(2)]
DEVICE = ["nowhere", "cpu:x", 1.5, True, []]
DTYPE = ["float32", torch.int64, torch.complex64, torch.bool, float, 32]
GRID = [6, "23", (6,), (1, 2, 3), (True, T), (0, T), (-1, -T), (2.0, 3), (2, 4), [2, None], {}, torch.tensor([2, 3])]
FREQS = [None, 3, "ab", ["a"], torch.ones(2)]
DECAY = ["fast", "", 5, None, True, b"ab", [-0.1], [-0.1] * 3, [0.1, -0.1], [math.nan] * 2, [-math.inf, -0.1]]
DECAY += [["a", "b"], [[-0.1], [-0.1]], [False, False], [None, None], torch.tensor([[-0.1, -0.1]])]
DECAY += [torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.complex64), {0: -0.1, 1: -0.1}]
MASK = [True, "all", [[True] * T] * B, torch.ones(B, T), torch.ones(B, T).long(), torch.ones(T).bool()]
MASK += [torch.ones(B, T - 1).bool(), torch.ones(B, 1, T).bool(), torch.ones(T, T).bool(), torch.ones(T, B).bool()]
MASK += [torch.ones(B, T, device="meta").bool()]
CU_SEQLENS = [
    [0, T],
    (0, T),
    T,
    "0",
    torch.tensor([0.0, T]),
    torch.tensor([[0, T]]),
    torch.tensor([T]),
    torch.tensor(T),
]
CU_SEQLENS += [torch.tensor(x) for x in ([0, T - 1], [1, T], [0, T + 1], [0, 4, 2, T], [-1, T])]


@dataclass
class Door:
    """call(**valid()) works; with any value of wrong[name] for name it must not.

    hides: options that `call` hands on and its signature does not show. after: looks whether anything has changed.
    runs: whether a call is quick enough to be tried here.
    """

    call: Callable[..., Any]
    valid: Callable[[], dict[str, Any]]
    wrong: dict[str, list[Any]]
    hides: tuple[str, ...] = ()
    runs: bool = True
    after: Callable[[dict[str, Any]], Any] = field(default=lambda kwargs: None)


def tensors(x, name="x"):
    """What must not come for x: of another type, dtype, rank, size or device."""
    found = [None, 3, "x", x.tolist(), np.zeros(x.shape, "float32"), x.long(), x.bool(), x.to(torch.complex64)]
    found += [x.to("meta"), x.to_sparse(), x[0], x[None], x.new_zeros(()), x.double()]
    return found if name == "v" else [*found, x[..., :-1]]  # the width of v is free


def states(state):
    """What must not come for a state."""
    kv, time = state.kv, state.time
    found = [
        {},
        [],
        0,
        "state",
        kv,
        (kv, time),
        vars(state),
        RetentionState(None, None),
        RetentionState(kv.tolist(), time),
    ]
    found += [RetentionState(kv, 3), RetentionState(kv, time - 3), RetentionState(kv, time.float())]
    found += [RetentionState(kv, time[:1]), RetentionState(kv[:1], time), RetentionState(kv[:1], time[:1])]
    found += [RetentionState(kv[..., :-1], time), RetentionState(kv.double(), time), RetentionState(kv.half(), time)]
    found += [RetentionState(kv.to("meta"), time), RetentionState(kv, time.to("meta")), RetentionState(kv[0], time)]
    return [*found, RetentionState(kv, time, kv[..., 0]), RetentionState(kv, time, 0)]


def unchanged(state):
    """Compares a state with what it was."""
    before = state.clone()

    def look(kwargs):
        assert all(torch.equal(x, y) for x, y in ((state.kv, before.kv), (state.time, before.time)))

    return look


FLAGS = ("use_glu", "ffn_bias", "activate_output", "norm_before", "final_norm", "deepnorm", "layernorm_embedding")
FLAGS += ("no_scale_embedding", "moe_top1_expert")
BACKBONE = dict(
    dim=WHOLE,
    num_layers=WHOLE,
    num_heads=[*WHOLE, 3],
    ffn_dim=MAYBE_WHOLE,
    activation_fn=[*NAME, None],
    ffn_backend=[*NAME, None],
    norm=[*NAME, None],
    norm_eps=EPS,
    subln=["", 1, 0, None, "batch", "rms"],
    dropout=RATE,
    activation_dropout=RATE,
    drop_path_rate=RATE,
    moe_freq=COUNT,
    moe_expert_count=COUNT,
    retention=[[], "decay", 3, True, {"num_head": 2}, {"scale": "a"}, {"gate": 3}, {0: 1}],
    device=DEVICE,
    dtype=DTYPE,
    **dict.fromkeys(FLAGS, FLAG),
)
X = torch.randn(B, T, DIM)
TOKEN = X[:, :1]
IDS = torch.randint(VOCAB, (B, T))
INPUT = tensors(X)
FORWARD = dict(
    mask=MASK, return_state=FLAG, form=NAME, backend=NAME, cu_seqlens=[*CU_SEQLENS[:8], torch.tensor([0, T])]
)
IDS_WRONG = [None, 3, "x", IDS.tolist(), IDS.numpy(), IDS.float(), IDS.bool(), IDS[0], IDS[None]]
IDS_WRONG += [IDS - VOCAB, IDS + VOCAB]


class NoProducts(TorchFunctionMode):
    """Within it, a product of matrices is a failure: arguments are checked first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in {"linear", "matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"}
        return func(*args, **(kwargs or {}))


def cases(doors):
    """Each argument of each door. A test for each of its values would take ten times as long."""
    return [pytest.param(door, name, id=f"{door}-{name}") for door, about in doors.items() for name in about.wrong]


def check_refusals(door, name):
    """Fail unless the door refuses each value that it must, before any computation, by names that it has."""
    for value in door.wrong[name]:
        kwargs = {**door.valid(), name: value}
        message = _refusal(door.call, kwargs)
        assert message is not None, f"{name} is taken: {value!r}"
        inside = value if isinstance(value, dict) else ()
        assert any(re.search(rf"\b{word}\b", message) for word in (name, *inside)), f"{value!r}: {message}"
        own = {*inspect.signature(door.call).parameters, *door.hides, *kwargs, *inside}
        subject = re.match(r"(\w+)(\.\w+)? must ", message)
        assert subject is None or subject[1] in own, f"{value!r}: {message}"
        door.after(kwargs)


def _refusal(call, kwargs):
    with NoProducts():
        try:
            call(**kwargs)
        except (ValueError, TypeError) as error:
            return str(error)
    return None
