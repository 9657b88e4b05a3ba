"""ONNX programs of our models, run by ONNX Runtime at sizes other than those they were exported with."""

import onnxruntime
import pytest
import timm
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import retention.integrations.timm  # noqa: F401 - registers the models
from retention import MultiScaleRetention, RetNet
from retention.integrations.swap import replace_attention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # torch.onnx's own
]

BATCH, LENGTH = Dim("batch", min=1, max=1000), Dim("length", min=1, max=100_000)
SIDE = Dim("side", min=2, max=64)
PYRAMID = dict(dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), num_classes=7)
MODEL = RetNet(dim=32, num_layers=2, num_heads=2).eval()


class WithState(torch.nn.Module):
    """A prompt, or the tokens after it: logits and the new state."""

    def forward(self, tokens, state=None):
        return MODEL(tokens, state=state, return_state=True)


class Padded(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, mask):
        return self.model(tokens, attention_mask=mask, use_cache=False).logits * mask[..., None]


def replaced_llama():
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    replace_attention(model, window=8, sinks=2)
    return Padded(model)


def embeddings(batch, length):
    return (torch.randn(batch, length, 32),)


def tokens(batch, length):
    return (torch.randint(256, (batch, length)),)


def padded(batch, length):
    return *tokens(batch, length), (torch.arange(length) >= torch.randint(length // 2 + 1, (batch, 1))).long()


@torch.no_grad()
def with_state(batch, length):
    return *tokens(batch, length), MODEL(*tokens(batch, 17), return_state=True)[1]


def images(batch, rows, columns):
    return (torch.randn(batch, 3, rows, columns),)


TEXT, ROWS = ({0: BATCH, 1: LENGTH},), ({0: BATCH},)
NORMALISED = dict(decay_norm=True, score_norm=True, learnable_decay=True, num_kv_heads=2)
CASES = {
    "layer": (lambda: MultiScaleRetention(32, 4), embeddings, TEXT, [(2, 130), (1, 1), (3, 64)]),
    "normalised": (lambda: MultiScaleRetention(32, 4, **NORMALISED), embeddings, TEXT, [(2, 130), (1, 200)]),
    "prompt": (WithState, tokens, TEXT, [(2, 130), (1, 64)]),
    "step": (WithState, with_state, ({0: BATCH}, [[{0: BATCH}] * 2] * 2), [(2, 1), (1, 1)]),
    "Llama": (replaced_llama, padded, TEXT * 2, [(2, 130), (1, 7), (3, 64)]),
    "ViT": (
        lambda: timm.create_model("vit_retention_tiny_patch16_224", depth=1, img_size=64),
        images,
        ROWS,
        [(2, 64, 64), (5, 64, 64)],
    ),
    "pyramid": (
        lambda: timm.create_model("pyramid_retention_tiny", **PYRAMID),
        images,
        ({0: BATCH, 2: 8 * SIDE, 3: 8 * Dim("columns", min=2, max=64)},),
        [(2, 64, 80), (1, 224, 224)],
    ),
    "RMT": (lambda: timm.create_model("rmt_tiny", **PYRAMID), images, ROWS, [(2, 64, 64), (5, 64, 64)]),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_onnx_runtime_computes_what_the_model_does(name):
    make, inputs, shapes, sizes = CASES[name]
    model = make().eval()
    program = torch.onnx.export(model, inputs(*sizes[0]), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for size in sizes:
        given = inputs(*size)
        named = zip((x.name for x in session.get_inputs()), tree_leaves(given), strict=True)
        outputs = session.run(None, {name: x.numpy() for name, x in named})
        for got, want in zip(outputs, tree_leaves(model(*given)), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
