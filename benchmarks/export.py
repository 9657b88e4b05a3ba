"""Time of a decoding step in Python, compiled ahead of time without Python, and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Run, Side, race, ratio
from benchmarks.record import Limit, Quick, add_case, duration, show, spread
from retention import RetNet
from retention.state import RetentionState

PYTHON, AHEAD, ONNX = "Python", "AOTInductor", "ONNX Runtime"


class Step(nn.Module):
    """One token for each row: the logits, and the states updated in place."""

    def __init__(self, model: RetNet):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: list[RetentionState]) -> Tensor:
        return self.model.step(tokens, state)


class Anew(Step):
    """The same with a new state, as ONNX has nothing that can be overwritten."""

    def forward(self, tokens: Tensor, state: list[RetentionState]) -> Any:
        return self.model(tokens, state=state, return_state=True)


def export(
    preset: Annotated[str, typer.Option(help="Preset of the RetNet.")] = "small",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    limit: Limit = 10.0,
    quick: Quick = False,
) -> None:
    """Time a decoding step of a RetNet in Python, in a package of AOTInductor and in ONNX Runtime, on the CPU.

    AOTInductor needs a C++ compiler; ONNX Runtime needs the extra `export`. A side that cannot run says why.
    """
    torch.manual_seed(0)
    model = RetNet.from_preset("tiny" if quick else preset).eval()
    with TemporaryDirectory() as folder, torch.no_grad():
        sides = {
            PYTHON: Side(lambda: _in_python(model, batch)),
            AHEAD: Side(lambda: _ahead_of_time(model, batch, Path(folder))),
            ONNX: Side(lambda: _in_onnx(model, batch)),
        }
        times = race(sides, 1.0 if quick else limit)
    size = sum(p.numel() for p in model.parameters())
    add_case({"preset": "tiny" if quick else preset, "batch": batch, "parameters": size}, times, PYTHON)
    rows = []
    for name, one in times.items():
        faster = ratio(times[PYTHON].seconds, one.seconds) if one.seconds and name != PYTHON else None
        speed = f"{batch / one.median:,.0f}" if one.seconds else one.failure
        rows.append([name, duration(one.median), speed, spread(faster) if faster else ""])
    title = f"A decoding step of a RetNet of {size / 1e6:.1f} M parameters, batch {batch}, float32"
    show(title, ["", "a step", "tokens/s", "times faster"], rows)


def _inputs(model: RetNet, batch: int) -> tuple[Tensor, list[RetentionState]]:
    prompt = torch.randint(model.vocab_size, (batch, 32))
    return prompt[:, :1], model(prompt, return_state=True)[1]


def _in_python(model: RetNet, batch: int) -> Run:
    inputs = _inputs(model, batch)
    return lambda: model.step(*inputs)


def _ahead_of_time(model: RetNet, batch: int, folder: Path) -> Run:
    inputs = _inputs(model, batch)
    program = torch.export.export(Step(model), inputs)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "step.pt2"))
    run = torch._inductor.aoti_load_package(package)
    return lambda: run(*inputs)


def _in_onnx(model: RetNet, batch: int) -> Run:
    import onnxruntime

    inputs = _inputs(model, batch)
    program = torch.onnx.export(Anew(model), inputs, dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    names = (x.name for x in session.get_inputs())
    given = {name: x.numpy() for name, x in zip(names, tree_leaves(inputs), strict=True)}
    return lambda: session.run(None, given)
