import cmath

import pytest
import torch

from retention.rotary import frequencies, rotate, rotation, rotation_table


def test_frequencies():
    assert frequencies("paper", 6) == pytest.approx((1, 0.01, 0.0001))
    assert frequencies("rope", 6) == pytest.approx((1, 10000 ** (-1 / 3), 10000 ** (-2 / 3)))
    assert frequencies("paper", 2) == (1,)
    with pytest.raises(ValueError, match="rotary must be one of 'paper', 'rope', 'xpos' or None; got rotary 'alibi'"):
        frequencies("alibi", 4)
    with pytest.raises(ValueError, match="even key dim per head; got key_dim 5; pass rotary=None"):
        frequencies("rope", 5)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd offset"])
def test_a_pair_turns_as_a_complex_number(interleaved, layout):
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "odd offset":
        x = torch.randn(2, 5, 7, dtype=torch.float64)[..., 1:]
    freqs = frequencies("paper", 6)
    got = rotate(x, rotation(torch.arange(3, 8), freqs, torch.float64), interleaved=interleaved)
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    for row in range(2):
        for token in range(5):
            for (a, b), freq in zip(pairs, freqs, strict=True):
                turned = complex(x[row, token, a], x[row, token, b]) * cmath.exp(1j * (token + 3) * freq)
                assert complex(got[row, token, a], got[row, token, b]) == pytest.approx(turned)


@pytest.mark.slow
def test_compiled_rotation_is_the_same():
    x, turns = torch.randn(2, 5, 6), rotation(torch.arange(5), frequencies("rope", 6))
    torch.testing.assert_close(torch.compile(rotate, fullgraph=True, backend="aot_eager")(x, turns), rotate(x, turns))


def test_angles_are_exact_far_out():
    turns = rotation(torch.tensor([1_000_003]), (1.0,))
    assert turns[0, 0, 0].item() == pytest.approx(cmath.exp(1_000_003j).real, abs=1e-7)


def test_half_precision_comes_back_as_it_was():
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    got = rotate(x, rotation(torch.arange(5), frequencies("rope", 6)))
    assert got.dtype == torch.bfloat16


def test_a_table_is_the_rotation_of_the_first_times():
    freqs = frequencies("paper", 6)
    for length in (5, 8193):  # kept, and too long for that
        table = rotation_table(length, freqs, torch.device("cpu"), torch.float64)
        assert torch.equal(table, rotation(torch.arange(length), freqs, torch.float64))
