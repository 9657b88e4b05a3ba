"""Replace the attention layers of an existing model with retention, and restore them.

`replace_attention` changes a model in place, `plan_replacement` only reports what it would do, and `restore_attention`
undoes it. An `Adapter` tells how one class of attention is replaced. `recover` and `replace_in_parts` train a model of
transformers further, and `load_swapped` opens a saved one.
"""

from typing import TYPE_CHECKING

from ..renamed import lazy_names
from .adapter import Adapter, Heads, find_adapter, full_name, register_adapter, register_recogniser
from .replace import SwapReport, plan_replacement, replace_attention, restore_attention
from .retention import HostedRetention
from .swapped import Swapped, replaced_by

if TYPE_CHECKING:
    from ..transformers import load_swapped as load_swapped
    from ..transformers.training.distill import recover as recover
    from ..transformers.training.distill import replace_in_parts as replace_in_parts
else:  # not in __all__, as they need transformers, which `import *` must not
    __getattr__ = lazy_names(
        __name__,
        {
            "load_swapped": "retention.integrations.transformers:load_swapped",
            "recover": "retention.integrations.transformers.training.distill:recover",
            "replace_in_parts": "retention.integrations.transformers.training.distill:replace_in_parts",
        },
    )

__all__ = [
    "Adapter",
    "Heads",
    "HostedRetention",
    "SwapReport",
    "Swapped",
    "find_adapter",
    "full_name",
    "plan_replacement",
    "register_adapter",
    "register_recogniser",
    "replace_attention",
    "replaced_by",
    "restore_attention",
]
