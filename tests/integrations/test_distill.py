"""A model whose attention was replaced learns to be what it was."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from retention.integrations.swap import replace_attention
from retention.integrations.transformers.training import distill

pytestmark = pytest.mark.slow
SIZES = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


class Countdown(torch.utils.data.Dataset):
    """Rows that count on in steps of their own: an attention layer finds out the step."""

    def __init__(self, rows):
        chance = torch.Generator().manual_seed(rows)
        start, step = (torch.randint(low, high, (rows, 1), generator=chance) for low, high in ((0, 32), (1, 5)))
        self.tokens = (start + step * torch.arange(24)) % 32

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
    options = dict(transfer_steps=30, tuning_steps=60, batch=16, tuning_lr=1e-3) | options
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
    options = dict(transfer_steps=15, tuning_steps=30, batch=16, tuning_lr=1e-3, **quiet)
    data = Countdown(2000), Countdown(64)
    first, second = distill.replace_in_parts(model, [[1], [0]], *data, out=tmp_path, **options)
    assert second.tuned < second.teacher + 0.3 * (second.replaced - second.teacher)
    assert second.replaced > first.tuned  # the second layer's softmax has just gone
    before = load_file(tmp_path / "part-1" / "tuning" / "checkpoint-30" / "model.safetensors")
    taught = load_file(tmp_path / "part-2" / "transfer" / "checkpoint-15" / "model.safetensors")
    assert len(taught) == 10  # of one layer: four projections; two maps, the decays, the gain and a gate
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
