"""Our models in the tests that every model of timm has to pass."""

import importlib.util
import os
from pathlib import Path

import pytest
import timm

import retention.integrations.timm  # noqa: F401

MODULES = ["vit_retention", "pyramid_retention", "rmt"]
MODELS = timm.list_models(module=MODULES)
VITS = timm.list_models(module=MODULES[0])
PYRAMIDS = timm.list_models(module=MODULES[1:])
SMALL = [name for name in MODELS if "tiny" in name or "small" in name]


def load():
    """timm's module of tests, from its source distribution."""
    path = Path(os.environ["TIMM_TESTS"]) / "test_models.py"
    spec = importlib.util.spec_from_file_location("timm_test_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tests = load()
of = pytest.mark.parametrize


def test_timm_would_run_its_tests_on_our_models():
    """The lists from which timm's tests take their models have ours, each in the right one."""
    assert len(MODELS) == 11
    assert set(VITS) <= set(timm.list_models(tests.NON_STD_FILTERS))
    assert set(PYRAMIDS).isdisjoint(timm.list_models(tests.NON_STD_FILTERS))
    assert set(MODELS) <= set(timm.list_models(exclude_filters=tests.EXCLUDE_FILTERS, name_matches_cfg=True))


@of("name", MODELS)
def test_forward(name):
    tests.test_model_forward(name, 1)


@of("name", MODELS)
def test_backward(name):
    tests.test_model_backward(name, 2)


@of("name", PYRAMIDS)
def test_default_cfgs(name):
    tests.test_model_default_cfgs(name, 1, "meta")


@of("name", VITS)
def test_default_cfgs_of_transformers(name):
    tests.test_model_default_cfgs_non_std(name, 1, "meta")


@of("name", PYRAMIDS)
def test_features(name):
    tests.test_model_forward_features(name, 1)


@of("name", MODELS)
def test_intermediates(name):
    tests.test_model_forward_intermediates_features(name, 1)
    tests.test_model_forward_intermediates(name, 1)


@of("name", SMALL)  # it runs a model about twenty times
def test_pruned_models(name):
    tests.test_prune_intermediate_layers_contract(name)


@of("name", MODELS)
def test_fx_forward(name):
    tests.test_model_forward_fx(name, 1)


@of("name", SMALL)
def test_fx_backward(name):
    tests.test_model_backward_fx(name, 2)
