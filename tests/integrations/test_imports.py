"""Public names are where the documents say; former names still work and warn."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retention.integrations import swap, timm
from retention.integrations.renamed import former_names

ROOT = Path(__file__).parents[2]

# Names that a room of integrations offers, by the room.
PUBLIC = {
    "swap": (
        *("Adapter", "Heads", "load_swapped", "plan_replacement", "recover", "register_adapter", "replace_attention"),
        *("replace_in_parts", "restore_attention"),
    ),
    "timm": ("RetentionAttention", "TimmAttention", "classify_strips", "retention_layer"),
    "transformers": (
        *("RetNetConfig", "RetNetForCausalLM", "RetNetForSequenceClassification", "RetNetForTokenClassification"),
        *("RetNetModel", "RetentionCacheLayer", "TransformersAttention", "attention_ran", "load_swapped"),
        *("register_attn_implementation", "register_xformers_attention"),
    ),
    "transformers.training.distill": ("Recovery", "recover", "replace_in_parts", "teacher_of"),
}
# Former full names, and the module in which the object is now.
FORMER = {
    "transformers.writing.stream": "transformers.decoding",
    "hosted.Heads": "swap",
    "hosted.HostedRetention": "swap",
    "transformers.distill.AttentionTransfer": "transformers.training.distill",
    "transformers.distill.Recovery": "transformers.training.distill",
    "transformers.distill.recover": "transformers.training.distill",
    "transformers.distill.replace_in_parts": "transformers.training.distill",
    "transformers.distill.teacher_of": "transformers.training.distill",
}


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, names in PUBLIC.items() for name in names])
def test_public_names_can_be_imported(room, name):
    namespace = {}
    exec(f"from retention.integrations.{room} import {name}", namespace)
    assert namespace[name].__name__ == name


@pytest.mark.slow
def test_swap_imports_transformers_only_for_names_that_need_it():
    code = """
import sys
import retention.integrations.swap as swap
from retention.integrations.swap import *
assert "transformers" not in sys.modules
from retention.integrations.swap import load_swapped, recover, replace_in_parts
print(load_swapped.__module__, recover.__module__)
"""
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    room = "retention.integrations.transformers"
    assert printed.split() == [f"{room}.loading", f"{room}.training.distill"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'retention.integrations.swap' has no attribute 'nothing'"):
        swap.nothing  # noqa: B018
    assert not hasattr(swap, "nothing")


@pytest.mark.parametrize("former", FORMER)
def test_former_names_work_and_warn(former):
    module, name = f"retention.integrations.{former}".rsplit(".", 1)
    place = importlib.import_module(f"retention.integrations.{FORMER[former]}")
    with pytest.warns(DeprecationWarning, match=re.escape(f"{module}.{name} is deprecated")) as caught:
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(place, name)
    assert f"use {place.__name__}.{name}" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_module_with_former_names_has_no_others():
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'other'"):
        former_names("here", {"name": "math:pi"})("other")


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.py"))]


def test_documents_use_no_former_name():
    shown = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert "retention.integrations.swap" in shown
    modules = {former.rpartition(".")[0] for former in FORMER}
    assert [module for module in modules if re.search(rf"retention\.integrations\.{module}\b", shown)] == []


@pytest.mark.slow
def test_the_package_says_what_it_needs(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; import retention.integrations.transformers"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(tmp_path)
    )
    assert 'pip install "multiscale-retention[transformers]"' in result.stderr


@pytest.mark.parametrize("door", [swap.replace_attention, swap.plan_replacement, swap.HostedRetention])
def test_former_names_of_options_work_and_warn(door):
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    what = swap.Heads(8, 2, 2, 4, 4) if door is swap.HostedRetention else model
    with pytest.warns(DeprecationWarning, match="the option scales is deprecated .*; use num_decays") as caught:
        found = door(what, scales=3)
    assert caught[0].filename == __file__
    if door is swap.replace_attention:
        assert model.retention.num_decays == 3
    elif door is swap.HostedRetention:
        assert found.num_decays == 3
    with pytest.warns(DeprecationWarning, match="use num_decays"):
        assert timm.retention_layer(scales=3).options == {"num_decays": 3}
    with pytest.raises(TypeError, match="scales is a former name of num_decays; got both; leave scales out"):
        door(what, scales=3, num_decays=3)
    with pytest.warns(DeprecationWarning, match="the option grid is deprecated .*; use grid_decay"):
        door(torch.nn.MultiheadAttention(8, 2) if what is model else what, grid=False)
