"""A model whose attention was replaced learns to be what it was."""

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from retention.integrations.swap import replace_attention
from retention.integrations.transformers.training import distill
from retention.integrations.transformers.training.best import Best
from retention.integrations.transformers.training.rates import STEPS, search_rates

pytestmark = pytest.mark.slow
SIZES = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


class Countdown(torch.utils.data.Dataset):
    """Rows that count on in steps of their own: an attention layer finds out the step."""

    def __init__(self, rows, length=24):
        chance = torch.Generator().manual_seed(rows)
        start, step = (torch.randint(low, high, (rows, 1), generator=chance) for low, high in ((0, 32), (1, 5)))
        self.tokens = (start + step * torch.arange(length)) % 32

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    options = dict(max_steps=150, per_device_train_batch_size=16, learning_rate=1e-2, lr_scheduler_type="cosine")
    quiet = dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    folder = str(tmp_path_factory.mktemp("teacher"))
    Trainer(model, TrainingArguments(folder, **options, **quiet), train_dataset=Countdown(2000)).train()
    return model.eval()


@pytest.fixture
def replaced(teacher):
    model = copy.deepcopy(teacher)
    replace_attention(model, gate="silu")
    return model


def recover(model, out, **options):
    options = dict(transfer_steps=30, tuning_steps=60, batch=16, transfer_lr=4e-2, tuning_lr=1e-3) | options
    quiet = dict(use_cpu=True, disable_tqdm=True, logging_steps=1000)
    return distill.recover(model, Countdown(2000), Countdown(64), out=out, **quiet, **options)


def test_recovery_comes_near_the_teacher(teacher, replaced, tmp_path):
    before = copy.deepcopy(teacher.state_dict())
    found = recover(replaced, tmp_path)
    assert found.teacher < 0.2  # it has learnt to count
    assert found.replaced > found.teacher + 0.1
    assert found.transferred < found.replaced
    assert found.tuned < found.teacher + 0.2 * (found.replaced - found.teacher)
    assert found.tokens == 90 * 16 * 24
    assert str(found).startswith(f"teacher {found.teacher:.4f}; replaced {found.replaced:.4f}")
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, before[name])


def test_the_teacher_shares_what_does_not_learn_and_nothing_else(replaced):
    replaced.lm_head.weight.requires_grad_(False)
    teacher = distill.teacher_of(replaced)
    theirs = dict(replaced.named_parameters())
    for name, weight in teacher.named_parameters():
        assert (weight is theirs[name]) == (name == "lm_head.weight"), name
        assert not weight.requires_grad
    assert theirs["model.norm.weight"].requires_grad


def test_the_first_stage_trains_the_replaced_layers_only(teacher, replaced, tmp_path):
    recover(replaced, tmp_path, transfer_steps=3, tuning_steps=0)
    theirs = dict(teacher.named_parameters())
    for name, weight in replaced.named_parameters():
        if ".self_attn." not in name:
            assert torch.equal(weight, theirs[name]), name
        else:
            assert name not in theirs or not torch.equal(weight, theirs[name]), name


def test_the_transfer_loss_is_the_relative_error_of_each_layer(teacher, replaced):
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    transfer = distill.AttentionTransfer(teacher, {name: replaced.get_submodule(name) for name in names})
    tokens = Countdown(4).tokens
    seen = {}
    for name in names:
        hook = lambda module, args, kwargs, out, name=name: seen.__setitem__(name, (args, kwargs, out[0]))  # noqa: E731
        teacher.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    teacher(tokens, use_cache=False)
    errors = []
    for name in names:
        args, kwargs, want = seen[name]
        got = replaced.get_submodule(name)(*args, **kwargs)[0]
        errors.append(((got - want) ** 2).sum() / (want**2).sum())
    torch.testing.assert_close(transfer(tokens)["loss"], sum(errors) / 2)
    transfer.release()
    assert all(not teacher.get_submodule(name)._forward_hooks.get(transfer.hooks[0].id) for name in names)
    assert not any("teacher" in name for name, _ in transfer.named_parameters())


def test_a_run_goes_on_from_its_last_checkpoint(replaced, tmp_path):
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append((args.output_dir.rpartition("/")[2], state.global_step))

    other = copy.deepcopy(replaced)
    options = dict(transfer_steps=4, tuning_steps=4, save_steps=2, callbacks=[Count()])
    first = recover(replaced, tmp_path, **options)
    assert steps == [("transfer", n) for n in range(1, 5)] + [("tuning", n) for n in range(1, 5)]
    again = recover(other, tmp_path, **options)  # from the beginning, with what is in the folder
    assert len(steps) == 8
    assert again.tuned == pytest.approx(first.tuned, abs=1e-5)


def test_replacing_in_parts_teaches_only_what_is_new_and_ends_as_well(teacher, tmp_path):
    model = copy.deepcopy(teacher)
    quiet = dict(use_cpu=True, disable_tqdm=True, logging_steps=1000)
    options = dict(transfer_steps=15, tuning_steps=30, batch=16, transfer_lr=4e-2, tuning_lr=1e-3, **quiet)
    data = Countdown(2000), Countdown(64)
    first, second = distill.replace_in_parts(model, [[1], [0]], *data, out=tmp_path, **options)
    assert second.tuned < second.teacher + 0.3 * (second.replaced - second.teacher)
    assert second.replaced > first.tuned  # the second layer's softmax has just gone
    before = load_file(tmp_path / "part-1" / "tuning" / "checkpoint-30" / "model.safetensors")
    taught = load_file(tmp_path / "part-2" / "transfer" / "checkpoint-15" / "model.safetensors")
    assert len(taught) == 11  # of one layer: four projections; two maps, the importance, decays, the gain and a gate
    assert any("layers.1.self_attn.retention" in name for name in before)

    other, nothing = copy.deepcopy(teacher), []
    count = TrainerCallback()
    count.on_step_end = lambda *args, **kwargs: nothing.append(1)
    again = distill.replace_in_parts(other, [[1], [0]], *data, out=tmp_path, callbacks=[count], **options)
    assert not nothing  # all of it was in the folder
    assert again[1].tuned == pytest.approx(second.tuned, abs=1e-5)
    with pytest.raises(ValueError, match=r"taught must name replaced layers; got 'lm_head'; there are model.layers.0"):
        recover(model, tmp_path / "none", taught=["lm_head"])


def test_a_model_with_its_attention_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no replaced attention; call replace_attention first"):
        recover(teacher, tmp_path)


@pytest.mark.slow
def test_a_rate_that_spoils_the_model_leaves_it_as_it_was(teacher, replaced, tmp_path):
    before = copy.deepcopy(replaced.state_dict())
    found = recover(replaced, tmp_path, transfer_steps=4, tuning_steps=4, transfer_lr=5.0, tuning_lr=5.0)
    assert found.replaced == found.transferred == found.tuned
    for name, weight in replaced.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.slow
def test_a_stage_ends_with_the_best_weights_it_has_seen_and_a_resumed_one_with_the_same(replaced, tmp_path):
    other, seen = copy.deepcopy(replaced), []

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 10:
                model.lm_head.weight.data.zero_()

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(metrics["eval_loss"])

    often = dict(transfer_steps=0, tuning_steps=12, eval_strategy="steps", eval_steps=2, save_steps=4)
    found = recover(replaced, tmp_path, callbacks=[Spoil()], **often)
    assert found.tuned == pytest.approx(min(seen[1:]), rel=1e-6)  # the first is the teacher's
    assert found.tuned < found.replaced < seen[-1]
    again = recover(other, tmp_path, **often)
    assert again.tuned == found.tuned
    for name, weight in replaced.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_each_layer_keeps_its_own_best_weights(tmp_path):
    parts = {"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)}
    parts["a"].bias.requires_grad_(False)

    def fill(value):
        for part in parts.values():
            for p in part.parameters():
                p.data.fill_(value)

    best = Best(tmp_path / "best.pt", parts)
    for value, a, b in ((1.0, 0.5, 0.2), (2.0, 0.4, 0.3), (3.0, 0.6, float("nan"))):
        fill(value)
        best.offer({"a": a, "b": b})
    Best(tmp_path / "best.pt", parts).restore()
    assert best.losses == {"a": 0.4, "b": 0.2}
    assert [parts["a"].weight.item(), parts["b"].weight.item(), parts["b"].bias.item()] == [2.0, 1.0, 1.0]
    assert parts["a"].bias.item() == 3.0  # it is not trained


def test_the_search_gives_each_part_the_rate_that_helps_it_most_and_changes_no_weight():
    steep, flat = (torch.nn.Parameter(torch.tensor(1.0)) for _ in range(2))
    groups = {
        "steep": lambda rate: [{"params": [steep], "lr": rate}],
        "flat": lambda rate: [{"params": [flat], "lr": rate}],
    }

    def losses():
        return {"steep": (steep - 0.95).square(), "flat": (flat - 0.2).square()}

    found, steps = search_rates(
        groups,
        (1e-3, 1e-2, 1e-1, 1.0, 10.0),
        lambda _: sum(losses().values()),
        lambda: {name: loss.item() for name, loss in losses().items()},
        hidden=True,
    )
    assert found == {"steep": 1e-2, "flat": 1e-1}
    assert steps == 4 * STEPS  # no part gains by a rate of 1, so 10 is not tried
    assert steep.item() == flat.item() == 1.0


@pytest.mark.slow
def test_rates_are_found_when_none_is_given(replaced, tmp_path):
    found = recover(replaced, tmp_path, transfer_steps=2, tuning_steps=2, transfer_lr=None, tuning_lr=None)
    kept = [json.loads((tmp_path / stage / "rates.json").read_text()) for stage in ("transfer", "tuning")]
    assert kept[0]["rates"].keys() == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert set(kept[0]["rates"].values()) <= {1e-3, 3e-3, 1e-2, 4e-2}
    assert kept[1]["rates"]["model"] in (3e-5, 1e-4, 3e-4, 1e-3)
    assert found.tokens == (4 + kept[0]["steps"] + kept[1]["steps"]) * 16 * 24


def test_the_search_starts_from_the_same_random_state_whether_the_stage_before_was_trained_or_loaded(
    replaced, tmp_path, monkeypatch
):
    """So a run that was killed before its first checkpoint searches as it did before, though dropout draws numbers."""
    drawn = []

    def found(groups, ladder, *_, **__):
        drawn.append(torch.rand(()).item())
        return dict.fromkeys(groups, ladder[0]), 0

    monkeypatch.setattr(distill, "search_rates", found)
    start = copy.deepcopy(replaced.state_dict())
    options = dict(transfer_steps=2, tuning_steps=1, transfer_lr=None, tuning_lr=None)
    recover(replaced, tmp_path, **options)
    shutil.rmtree(tmp_path / "tuning")
    replaced.load_state_dict(start)
    recover(replaced, tmp_path, **options)
    assert len(drawn) == 3  # both stages, then the second alone
    assert drawn[1] == drawn[2]


@pytest.mark.slow
def test_a_stage_ends_when_evaluations_bring_nothing(replaced, tmp_path):
    often = dict(transfer_steps=0, eval_strategy="steps", eval_steps=1, save_steps=100, tuning_lr=5.0, patience=2)
    other = copy.deepcopy(replaced)
    found = recover(replaced, tmp_path, tuning_steps=50, **often)
    assert found.tokens < 50 * 16 * 24
    assert recover(other, tmp_path, tuning_steps=50, **often) == found  # it is not trained further


@pytest.mark.slow
def test_with_layers_alone_to_tune_the_teacher_shares_all_other_weights(teacher, tmp_path, monkeypatch):
    model, seen = copy.deepcopy(teacher), []
    run = distill._Stage.run
    monkeypatch.setattr(distill._Stage, "run", lambda self: (seen.append(self), run(self)))
    options = dict(transfer_steps=1, tuning_steps=2, batch=4, transfer_lr=1e-3, tuning_lr=1e-3)
    quiet = dict(use_cpu=True, disable_tqdm=True)
    data = Countdown(200), Countdown(16)
    distill.replace_in_parts(model, [[1], [0]], *data, out=tmp_path, tune="layers", **options, **quiet)
    for stage in seen:
        if stage.args.output_dir.endswith("tuning"):
            theirs = dict(stage.teacher.named_parameters())
            for name, weight in model.named_parameters():
                assert (theirs.get(name) is weight) == (".self_attn." not in name), name
    before = dict(teacher.named_parameters())
    for name, weight in model.named_parameters():
        assert ".self_attn." in name or torch.equal(weight, before[name]), name
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight
    )
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(ValueError, match="tune must be one of 'all', 'layers', 'lora'; got tune 'some'"):
        recover(model, tmp_path / "none", tune="some")


def test_low_rank_updates_train_the_other_linear_layers_and_become_part_of_them(teacher, tmp_path):
    model, before = copy.deepcopy(teacher), copy.deepcopy(teacher.state_dict())
    options = dict(transfer_steps=5, tuning_steps=8, batch=8, transfer_lr=4e-2, tuning_lr=1e-3, tune="lora", rank=3)
    quiet = dict(use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=4)
    data = Countdown(200), Countdown(32)
    again = copy.deepcopy(model)
    parts = distill.replace_in_parts(model, [[1], [0]], *data, out=tmp_path, **options, **quiet)
    assert [part.teacher for part in parts] == [pytest.approx(parts[0].teacher)] * 2  # no update reached the teacher
    assert parts[1].tuned < parts[1].transferred
    assert torch.equal(teacher.lm_head.weight, before["lm_head.weight"])
    for name, weight in model.state_dict().items():
        change = None if ".self_attn." in name else weight - before[name]
        if change is not None and "mlp" in name:  # each part adds an update
            assert 0 < torch.linalg.matrix_rank(change) <= 6, name
        else:
            assert change is None or not change.any(), name
    assert {type(module).__module__.split(".")[0] for module in model.modules()} == {
        "torch",
        "transformers",
        "retention",
    }
    assert all(weight.requires_grad for weight in model.parameters())
    distill.replace_in_parts(again, [[1], [0]], *data, out=tmp_path, **options, **quiet)  # reads what is in the folder
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name])


@pytest.mark.parametrize("tune", ["layers", "lora"])
def test_a_teacher_that_shares_frozen_weights_stays_as_it_was(tune, teacher, replaced, tmp_path):
    with distill._learning(replaced, ["model.layers.0.self_attn", "model.layers.1.self_attn"], tune):
        mine = distill.teacher_of(replaced)
    recover(replaced, tmp_path, teacher=mine, tune=tune, transfer_steps=0, tuning_steps=3)
    tokens = Countdown(4).tokens
    torch.testing.assert_close(mine(tokens).logits, teacher(tokens).logits)


def test_low_rank_updates_need_linear_layers_and_a_rank(replaced, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="rank must be an integer of at least 1; got rank 0"):
        recover(replaced, tmp_path / "none", tune="lora", rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match='tune "lora" needs the library peft; pip install'):
        recover(replaced, tmp_path / "none", tune="lora")
    assert not (tmp_path / "none").exists()


def test_the_second_stage_goes_on_with_longer_sequences(teacher, tmp_path):
    model, seen = copy.deepcopy(teacher), []

    class Lengths(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
            rows = next(iter(train_dataloader))["input_ids"].shape
            seen.append((args.output_dir.removeprefix(f"{tmp_path}/"), *rows))

    options = dict(transfer_steps=2, tuning_steps=2, batch=6, transfer_lr=4e-2, tuning_lr=1e-3, callbacks=[Lengths()])
    quiet = dict(use_cpu=True, disable_tqdm=True)
    longer = [(Countdown(99, length=n), Countdown(9, length=n)) for n in (48, 200)]
    found = distill.replace_in_parts(
        model, [[0, 1]], Countdown(99), Countdown(9), out=tmp_path, longer=longer, longer_steps=3, **options, **quiet
    )
    first = [("part-1/transfer", 6, 24), ("part-1/tuning", 6, 24)]
    assert seen == [*first, ("context-48/tuning", 3, 48), ("context-200/tuning", 1, 200)]
    assert [recovery.tokens for recovery in found] == [4 * 6 * 24, 3 * 3 * 48, 3 * 200]
    assert all(recovery.tuned <= recovery.transferred == recovery.replaced for recovery in found[1:])


def test_the_first_stage_does_not_run_the_teachers_head(teacher, replaced):
    transfer = distill.AttentionTransfer(teacher, {"model.layers.0.self_attn": replaced.model.layers[0].self_attn})
    ran = []
    hook = teacher.lm_head.register_forward_hook(lambda *_: ran.append(1))
    transfer(Countdown(2).tokens)
    hook.remove()
    transfer.release()
    assert not ran


def test_a_layer_whose_attention_gives_zeros_has_a_finite_error(teacher):
    silent = copy.deepcopy(teacher)
    silent.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model = copy.deepcopy(silent)
    replace_attention(model)
    transfer = distill.AttentionTransfer(silent, {"model.layers.0.self_attn": model.model.layers[0].self_attn})
    found = transfer(Countdown(2).tokens)
    found["loss"].backward()
    transfer.release()
    assert found["errors"].tolist() == [0.0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in transfer.parameters())
