"""Replace the attention layers of an existing model with retention, and restore them.

`replace_attention` changes a model in place, `plan_replacement` only reports what it would do, and `restore_attention`
undoes it. An `Adapter` tells how one class of attention is replaced.
"""

from .adapter import Adapter, Heads, find_adapter, full_name, register_adapter, register_recogniser
from .replace import SwapReport, plan_replacement, replace_attention, restore_attention
from .retention import HostedRetention
from .swapped import Swapped, replaced_by

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
