"""The former place of the training of replaced models, now `training/distill.py`; removed in 0.2."""

from ..renamed import former_names

_NAMES = ("AttentionTransfer", "Recovery", "recover", "replace_in_parts", "teacher_of")
__getattr__ = former_names(
    __name__, {name: f"retention.integrations.transformers.training.distill:{name}" for name in _NAMES}
)
