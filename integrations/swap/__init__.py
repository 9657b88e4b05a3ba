"""Put retention where the attention of an existing model is, and take it out again."""

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
