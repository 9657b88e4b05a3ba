"""The count of multiply-adds: worked out by hand for parts, and the published models' own for the whole."""

import pytest
import timm
from torch import nn

from benchmarks import macs


def test_products_and_convolutions_are_counted():
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    model = nn.Sequential(convolution, nn.Flatten(2), nn.Linear(64, 5)).to("meta")
    assert macs._operations(model, size=8) == 64 * 4 * 3 * 9 + 4 * 64 * 5


@pytest.mark.slow
def test_attention_is_counted():
    """RMT's code counts 2.64 billion for the tiny model; a softmax over 14 x 14 cells is part of it."""
    model = timm.create_model("rmt_tiny", device="meta").eval()
    assert macs._operations(model) == pytest.approx(2.64e9, rel=2e-3)
