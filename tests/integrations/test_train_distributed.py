"""Trainings in which processes share the sequences, the heads or the weights equal those of one process."""

import dataclasses
import json
import shutil

import processes
import pytest
import torch
import transformers
from short_runs import SQUARES

from retention.integrations.transformers.compat import MIXED_WEIGHTS
from retention.integrations.transformers.training import train as training
from retention.integrations.transformers.training.corpus import Blocks
from retention.integrations.transformers.training.parallel import batch_per_process, check_epochs, meshes_of
from retention.integrations.transformers.training.settings import Settings

SMALL = dict(vocab_size=256, dim=16, num_layers=2, num_heads=2, z_loss_coeff=1e-2)
STEPS = dict(steps=6, save_every=3, eval_every=3, batch=4, accumulate=2, context=33, lr=1e-3, device="cpu")
# transformers 5.16 cannot load the optimiser of several processes onto "cpu:0", unless it is sharded.
RESUMES = not transformers.__version__.startswith("5.16.")


def settings(folder, config=SMALL, **options):
    return Settings(files=[str(folder / "text.txt")], config=config, **(STEPS | options))


def losses(out):
    """The losses that a run has logged, those of evaluations too."""
    history = json.loads((out / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    return {(entry["step"], name): entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry}


def weights(out):
    return training.RetNetForCausalLM.from_pretrained(out).parameters()


def check(world, name, **options):
    """Train, resume from the middle, and compare both with a run of one process."""
    out, whole = world.folder / name, world.folder / "whole"
    sharded = "fsdp" in options or "tensor_parallel" in options
    for resume in (False, True) if RESUMES or sharded else (False,):
        processes.wait()
        run = training.train(settings(world.folder, **options), out, resume=resume)
        assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
        assert run.loss == pytest.approx(losses(whole)[6, "eval_loss"], rel=1e-5)
        for found, wanted in zip(weights(out), weights(whole), strict=True):
            assert torch.allclose(found, wanted, atol=1e-4)
        processes.wait()
        if world.rank == 0:  # as the command, which prints a sample
            run.model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)
            shutil.rmtree(out / "checkpoint-6")


def rows(world):
    """Each process reads its own rows only. One process goes on with this run, see below."""
    read = {"train": set(), "valid": set()}

    def recorded(blocks, index):
        read["train" if blocks.tokens > 10_000 else "valid"].add(index)
        return row(blocks, index)

    row, Blocks.__getitem__ = Blocks.__getitem__, recorded
    try:
        training.train(settings(world.folder, batch=2), world.folder / "rows")
    finally:
        Blocks.__getitem__ = row
    both = [None, None]
    torch.distributed.all_gather_object(both, read)
    shared = {part: both[0][part] & both[1][part] for part in read}
    assert shared["train"] == {0}  # which each has tried
    assert len(shared["valid"]) <= 3  # which fill the last batch
    assert 24 <= len(read["train"]) <= 28  # and those of the next step
    assert losses(world.folder / "rows") == pytest.approx(losses(world.folder / "whole"), rel=1e-5)


def parts_of_sequences(world):
    check(world, "parts", context_parallel=2)


def shards_of_weights(world):
    check(world, "shards", fsdp=True, batch=2)


def shards_and_parts(world):
    check(world, "both", fsdp=True, context_parallel=2)


def heads(world):
    if not MIXED_WEIGHTS:
        with pytest.raises(ValueError, match="tensor_parallel needs a transformers .*; got transformers 5.16"):
            settings(world.folder, tensor_parallel=2).check()
        return
    check(world, "heads", tensor_parallel=2)


def refused(world):
    bad = {
        "got context_parallel 3, tensor_parallel 1, 2 processes; .* --nproc_per_node 3": dict(context_parallel=3),
        "got context_parallel 2, tensor_parallel 2, 2 processes": dict(context_parallel=2, tensor_parallel=2),
        "got tensor_parallel 2, 2 processes; leave fsdp out": dict(tensor_parallel=2, fsdp=True),
        "must divide num_heads; got 3 heads": dict(tensor_parallel=2, config=dict(dim=24, num_layers=1, num_heads=3)),
        "need dtype float32 or bfloat16; got dtype 'float16'": dict(fsdp=True, dtype="float16"),
        "score_norm": dict(
            context_parallel=2, config=dict(dim=16, num_layers=1, num_heads=2, retention={"score_norm": "absolute"})
        ),
    }
    if not MIXED_WEIGHTS:  # which refuses heads in parts at once
        bad = {message: options for message, options in bad.items() if "tensor_parallel" not in options}
    for message, options in bad.items():
        with pytest.raises(ValueError, match=message):
            training.train(settings(world.folder, **options), world.folder / "refused")
    processes.wait()
    assert not (world.folder / "refused").exists()


def parts_and_rows(world):
    check(world, "parts-and-rows", context_parallel=2, batch=2)


def heads_and_shards(world):
    if MIXED_WEIGHTS:
        check(world, "heads-and-shards", tensor_parallel=2, fsdp=True, batch=2)


def heads_shards_and_parts(world):
    if MIXED_WEIGHTS:
        check(world, "all", tensor_parallel=2, fsdp=True, context_parallel=2)
    with pytest.raises(ValueError, match=r"got tensor_parallel 2, 4 processes; add --fsdp, or raise .* to 4"):
        meshes_of(training.TrainingArguments(use_cpu=True), 1, 2, False)


OF_FOUR = [parts_and_rows, heads_and_shards, heads_shards_and_parts]
CASES = [rows, parts_of_sequences, shards_of_weights, shards_and_parts, heads, refused]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run of one process."""
    made = tmp_path_factory.mktemp("trainings")
    (made / "text.txt").write_text(SQUARES)
    training.train(settings(made), made / "whole")
    return made


@pytest.fixture(scope="module")
def errors(request, folder):
    preload = ["torch", "retention.integrations.transformers.training.train"]
    found = processes.run(processes.selected(request, CASES), 2, preload, folder)
    return found | processes.run(processes.selected(request, OF_FOUR), 4, preload, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case.__name__ for case in CASES + OF_FOUR])
def test_processes_train_as_one(errors, case):
    assert not errors[case], errors[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rows"])
def test_a_run_of_two_processes_goes_on_with_one(errors, case, folder):
    assert not errors[case]
    out = folder / "rows"
    shutil.rmtree(out / "checkpoint-6")
    training.train(Settings.read(out), out, resume=True)
    assert losses(out) == pytest.approx(losses(folder / "whole"), rel=1e-5)
    kept = dataclasses.asdict(Settings.read(out))
    assert (kept["processes"], kept["batch"]) == (2, 2)


def test_a_resumed_run_keeps_its_batch():
    assert [batch_per_process(4, 3, now) for now in (1, 2, 6, 12)] == [12, 6, 2, 1]
    with pytest.raises(ValueError, match="its batch of 12 sequences.*; got 5 processes; .* 1, 2, 3, 4, 6 or 12"):
        batch_per_process(4, 3, 5)


@pytest.mark.parametrize(
    ("begun", "now", "rows", "passes", "other"),
    [(1, 2, 40, 99, ""), (1, 2, 41, 10, ""), (2, 4, 41, 99, ""), (1, 2, 41, 11, "one"), (2, 1, 41, 11, "several")],
)
def test_a_last_batch_that_would_differ_is_refused(begun, now, rows, passes, other):
    if not other:
        return check_epochs(begun, now, rows, 4, passes)
    with pytest.raises(ValueError, match=f"a run that {other} process.* cannot go on with {now}: the 41 sequences"):
        check_epochs(begun, now, rows, 4, passes)
