"""The former place of `stream`, now in `decoding.py`; removed in 0.2."""

from ..renamed import former_names

__getattr__ = former_names(__name__, {"stream": "retention.integrations.transformers.decoding:stream"})
