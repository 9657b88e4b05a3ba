"""Models of this library, and models with replaced attention, run tasks of lm-eval.

The tests need lm-eval, which the extra eval installs; without it they are skipped. They need no network.
"""

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from retention.cli import app
from retention.integrations.swap import replace_attention
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM
from retention.integrations.transformers.training.tasks import find_tasks, run_tasks

SUMS = [(f"{n} plus 1 is", [f"{n + 1}", f"{n + 5}"], n % 2) for n in range(6)]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{others}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
CHOICES = """
doc_to_choice: "{{choices}}"
doc_to_target: gold
"""
WRITING = """
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 5, do_sample: false}
"""


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason='needs lm-eval; pip install "multiscale-retention[eval]"')


@pytest.fixture
def folder(tmp_path):
    """A folder with two tasks, one of choices and one of writing, and their items."""
    made = tmp_path / "my_tasks"
    made.mkdir()
    items = [{"question": question, "choices": choices, "gold": gold} for question, choices, gold in SUMS]
    (made / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    for name, kind, metric, others in (
        ("sums", "multiple_choice", "acc", CHOICES),
        ("written_sums", "generate_until", "exact_match", WRITING),
    ):
        text = YAML.format(name=name, file=made / "items.jsonl", kind=kind, metric=metric, others=others)
        (made / f"{name}.yaml").write_text(text)
    return made


def llama():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.5, **sizes)).eval()


def share_of_right_choices(model, tokenizer):
    """The share of items whose right choice is the likelier one, by one pass for each text."""
    right = []
    for question, choices, gold in SUMS:
        scores = []
        for choice in choices:
            prompt, whole = (
                torch.tensor([tokenizer(text)["input_ids"]]) for text in (question, f"{question} {choice}")
            )
            log_p = model(whole[:, :-1]).logits.double().log_softmax(-1)
            scores.append(log_p.gather(-1, whole[:, 1:, None])[0, prompt.shape[1] - 1 :].sum().item())
        right.append(scores[gold] > scores[1 - gold])
    return sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retnet", "replaced"])
def test_a_model_is_judged_as_it_computes(kind, lm_eval, folder, tokenizer):
    config = RetNetConfig(vocab_size=300, dim=32, num_layers=2, num_heads=2, initializer_range=1.0)
    model = RetNetForCausalLM(config).eval() if kind == "retnet" else llama()
    if kind == "replaced":
        replace_attention(model, window=4, sinks=1)
    names = ["sums", "written_sums"]
    found = run_tasks({"model": model}, tokenizer, names, find_tasks(names, folder), batch=4)["model"]
    assert found["task sums, acc"] == pytest.approx(share_of_right_choices(model, tokenizer))
    assert found["task written_sums, exact_match"] == 0
    assert found["task sums, acc_stderr"] >= 0


@pytest.mark.slow
def test_the_harness_opens_a_saved_model(lm_eval, folder, tokenizer, tmp_path):
    model = RetNetForCausalLM(RetNetConfig(vocab_size=300, dim=32, num_layers=2, num_heads=2)).eval()
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    arguments = dict(pretrained=str(tmp_path / "ours"), device="cpu", trust_remote_code=True)
    options = dict(tasks=["sums"], task_manager=find_tasks(["sums"], folder), log_samples=False)
    outcome = lm_eval.simple_evaluate("hf", model_args=arguments, **options)
    assert outcome["results"]["sums"]["acc,none"] == pytest.approx(share_of_right_choices(model, tokenizer))


@pytest.mark.slow
def test_the_command_shows_tasks_of_teacher_and_model_side_by_side(lm_eval, folder, tokenizer, text, tmp_path):
    teacher = llama()
    for name in ("teacher", "model"):
        teacher.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        replace_attention(teacher)
    words = ["evaluate", tmp_path / "model", text, "--teacher", tmp_path / "teacher", "--context", "64", "--items", "2"]
    words += ["--device", "cpu", "--tasks", "sums", "--include-path", folder, "--json", tmp_path / "found.json"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    shown = [f"{values['task sums, acc']:.4f}" for values in found.values()]
    assert list(found) == [str(tmp_path / "teacher"), str(tmp_path / "model")]
    row = next(line for line in result.output.splitlines() if line.startswith("task sums, acc "))
    assert row.split()[3:] == shown


def test_unknown_tasks_and_folders_are_refused(lm_eval, folder):
    with pytest.raises(ValueError, match="include_path must be a folder with tasks in YAML files; got .*/nowhere"):
        find_tasks(["sums"], folder / "nowhere")
    with pytest.MonkeyPatch.context() as patch:  # lm-eval's own tasks, which take seconds to read
        manager = sys.modules["lm_eval.tasks"].TaskManager
        patch.setattr(
            "lm_eval.tasks.TaskManager", lambda include_path, include_defaults: manager(None, include_path, False)
        )
        with pytest.raises(ValueError, match=f"lm-eval and {folder} must have the tasks; unknown: nothing, no_.*; "):
            find_tasks(["sums", "nothing", "no_*"], folder)


# --- without lm-eval --------------------------------------------------------------------------------------------------


def refusal(*words):
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    assert result.exit_code == 2
    return result.output


def test_tasks_without_lm_eval_are_refused_before_a_model_is_opened(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert 'not installed; pip install "multiscale-retention[eval]"' in refusal("nowhere", "--tasks", "hellaswag")


def test_a_folder_of_tasks_without_their_names_is_refused(tmp_path):
    assert "tasks must name some" in refusal("nowhere", "--include-path", tmp_path)


def test_tasks_for_a_model_of_bytes_are_refused(tmp_path, monkeypatch):
    RetNetForCausalLM(RetNetConfig(vocab_size=256, dim=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    monkeypatch.setattr("retention.integrations.transformers.training.evaluation.find_tasks", lambda *_: None)
    assert "need a model with a tokenizer" in refusal(tmp_path, "--tasks", "sums")
