"""Former names of options."""

import warnings

import pytest

from retention.former import current_options, former_options

NAMES = {"narrow": "wide", "width": "dim"}
FLAGS = {"narrow": {True: False, False: True}}


def test_former_names_and_values_become_the_current_ones_without_a_warning():
    assert current_options({"narrow": True, "width": 3, "a": 1}, NAMES, FLAGS) == {"wide": False, "dim": 3, "a": 1}


def test_a_flag_that_is_no_former_name_here_keeps_its_value():
    assert current_options({"narrow": True}, {"width": "dim"}, FLAGS) == {"narrow": True}


def test_a_function_takes_former_names_with_one_warning_for_each():
    made = former_options(NAMES, FLAGS)(lambda **options: options)
    with pytest.warns(DeprecationWarning, match="will be removed in 0.2") as warned:
        assert made(narrow=False, width=3) == {"wide": True, "dim": 3}
    assert {str(w.message).split("; ")[1] for w in warned} == {"use wide", "use dim"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made(wide=True, dim=3) == {"wide": True, "dim": 3}


def test_an_option_under_both_names_and_a_wrong_flag_are_errors():
    with pytest.raises(TypeError, match="width is a former name of dim; got both; leave width out"):
        current_options({"width": 1, "dim": 1}, NAMES, FLAGS)
    with pytest.raises(ValueError, match="narrow must be True or False; got narrow 1"):
        current_options({"narrow": 1}, NAMES, FLAGS)
