"""What moves between releases of transformers, in the release that is installed and in those that may come."""

import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM, compat
from retention.integrations.transformers.compat import CACHE, CACHE_NAMES, cache_by_any_name, replace_cache


@cache_by_any_name
def forward(self, ids, cache=None, **others):
    return cache, others


def test_a_forward_takes_the_cache_under_every_name_and_shows_that_of_the_installed_release():
    assert list(inspect.signature(forward).parameters) == ["self", "ids", CACHE, "others"]
    made = DynamicCache()
    for name in CACHE_NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # an old name is deprecated where there is a new one
            assert forward(None, 1, **{name: made}) == (made, {})
        assert forward(None, 1, **{name: None}) == (None, {})
    assert forward(None, 1, made, more=2) == (made, {"more": 2})
    with pytest.raises(ValueError, match="the cache must be given once; got cache and past_key_values"):
        forward(None, 1, cache=made, past_key_values=made)
    with pytest.raises(TypeError, match=r"must be a transformers.Cache; got tuple \(transformers .*; tested: 5.16"):
        forward(None, 1, **{CACHE: ()})


def test_a_cache_is_found_by_its_type_wherever_it_stands():
    made, other = DynamicCache(), object()
    for args, kwargs in (((1, made), {}), ((1,), {"memory": made}), ((), {CACHE: made, "x": 1})):
        new_args, new_kwargs, found = replace_cache(args, kwargs, other)
        assert found is made
        assert [*new_args, *new_kwargs.values()].count(other) == 1
        assert made not in new_args
    both = EncoderDecoderCache(made, DynamicCache())
    assert replace_cache((), {CACHE: both}, other)[2] is made
    assert replace_cache((1,), {CACHE: None}, other) == ((1,), {CACHE: None}, None)
    with pytest.raises(TypeError, match="layer_past must be a transformers.Cache; got list"):
        replace_cache((), {"layer_past": [1]}, other)


def test_what_a_model_returns_has_the_cache_under_the_name_of_the_installed_release():
    out = RetNetForCausalLM(RetNetConfig(dim=16, num_layers=1, num_heads=2)).eval()(torch.zeros(1, 3).long())
    assert out[CACHE] is compat.cache_of(out)
    assert out[CACHE].get_seq_length() == 3
    assert compat.as_output(out[CACHE]) == {CACHE: out[CACHE]}


@pytest.mark.parametrize(("version", "warned"), [("5.16.1", False), ("5.99.0", True), ("6.0.0.dev0", True)])
def test_a_release_newer_than_those_tested_warns_and_says_which_were(version, warned, monkeypatch):
    # Not `import transformers` here: while it loads, transformers may replace its own module object.
    monkeypatch.setattr(compat.transformers, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compat.warn_if_untested()
    told = [text for warning in caught if "transformers" in (text := str(warning.message))]
    tested = ", ".join(compat.TESTED)
    want = f"transformers {version} is newer than the versions that were tested ({tested}); if something fails, "
    assert [line.startswith(want) for line in told] == ([True] if warned else [])
