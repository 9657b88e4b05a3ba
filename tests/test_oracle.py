"""The oracle itself, against numbers worked out by hand."""

import math

import oracle
import pytest
import torch

HALF = torch.tensor([math.log(0.5)], dtype=torch.float64)


def one(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


def test_causal():
    out = oracle.retain(one(1, 1, 2), one(1, 1, 1), one(8, 4, 2), HALF)
    assert out.flatten().tolist() == pytest.approx([8, 4 + 8 / 2, 2 * (2 + 4 / 2 + 8 / 4)])


def test_bidirectional():
    out = oracle.retain(one(1, 1, 1), one(1, 1, 1), one(8, 4, 2), HALF, causal=False)
    assert out.flatten().tolist() == pytest.approx([8 + 4 / 2 + 2 / 4, 8 / 2 + 4 + 2 / 2, 8 / 4 + 4 / 2 + 2])


def test_grid():
    out = oracle.retain(one(1, 1, 1, 1), one(1, 1, 1, 1), one(8, 4, 2, 1), HALF, causal=False, grid=(2, 2))
    assert out.flatten().tolist() == pytest.approx(
        [
            8 + 4 / 2 + 2 / 2 + 1 / 4,
            8 / 2 + 4 + 2 / 4 + 1 / 2,
            8 / 2 + 4 / 4 + 2 + 1 / 2,
            8 / 4 + 4 / 2 + 2 / 2 + 1,
        ]
    )


def test_time_stands_still_over_padding():
    mask = torch.tensor([[True, False, True]])
    out = oracle.retain(one(1, 1, 1), one(1, 1, 1), one(8, 4, 2), HALF, mask=mask)
    assert out.flatten().tolist() == pytest.approx([8, 0, 2 + 8 / 2])


def test_segments_are_apart():
    out = oracle.retain(one(1, 1, 1), one(1, 1, 1), one(8, 4, 2), HALF, cu_seqlens=torch.tensor([0, 1, 3]))
    assert out.flatten().tolist() == pytest.approx([8, 4, 2 + 4 / 2])


def test_normalisers():
    # scores 3 (own) and 3/2 (one before); sum of decays 1 + 1/2
    q, k, v = one(1, 3), one(1, 1), one(0, 1)
    assert oracle.retain(q, k, v, HALF)[0, 0, 1, 0] == 3
    assert oracle.retain(q, k, v, HALF, decay_norm=True)[0, 0, 1, 0].item() == pytest.approx(3 / math.sqrt(1.5))
    assert oracle.retain(q, k, v, HALF, score_norm=True)[0, 0, 1, 0].item() == pytest.approx(3 / 4.5)
    assert oracle.retain(-q, k, v, HALF, score_norm=True)[0, 0, 1, 0].item() == pytest.approx(-3 / 4.5)
    assert oracle.retain(-q, k, v, HALF, score_norm="absolute")[0, 0, 1, 0].item() == pytest.approx(-3 / 4.5)


def test_state():
    assert oracle.state(one(1, 1, 1), one(8, 4, 2), HALF, heads=1).item() == pytest.approx(2 + 4 / 2 + 8 / 4)
