"""What this library says of the xformers that it finds."""

import torch

from retention import explain
from retention.__main__ import report
from retention.xformers import library, probe


def test_it_says_what_it_found(unprobed):
    for text in (explain(*torch.ones(3, 1, 2, 4, 8), torch.full((2,), -0.1)), report()):
        assert "xformers 0." in text
        assert "compiled library: " in text
        assert "attention operators: " in text
    assert "none takes a call on cpu" in probe.found("cpu")
    root = OSError("libcudart.so.12: cannot open shared object file")
    try:
        raise RuntimeError("cannot load") from root
    except RuntimeError as error:
        unprobed.setattr(library.package()._cpp_lib, "_cpp_library_load_exception", error)
    assert "compiled library: not loaded (OSError: libcudart.so.12: cannot open" in probe.found("cpu")
    unprobed.setattr(library.package()._cpp_lib, "_cpp_library_load_exception", None)
    assert "compiled library: loaded" in probe.found("cpu")
    unprobed.delattr(library.package()._cpp_lib, "_cpp_library_load_exception")
    assert "compiled library: unknown (AttributeError" in probe.found("cpu")


def test_operators_that_take_a_call_are_listed(unprobed):
    from xformers.ops import fmha

    class Taking:
        NAME = "fast"

        @staticmethod
        def not_supported_reasons(inputs):
            return []

    unprobed.setattr(fmha, "ALL_FW_OPS", [*fmha.ALL_FW_OPS, Taking])
    assert "attention operators: fast" in probe.found("cpu")
