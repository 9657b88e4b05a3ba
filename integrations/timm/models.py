"""Former place of the models in `vit_retention`."""

from ..renamed import former_names

__getattr__ = former_names(
    __name__,
    {
        name: f"retention.integrations.timm.vit_retention:{name}"
        for name in (
            "default_cfgs",
            "vit_retention_tiny_patch16_224",
            "vit_retention_small_patch16_224",
            "vit_retention_base_patch16_224",
        )
    },
)
