"""Parts of xformers (https://github.com/facebookresearch/xformers) for the layers around retention.

`attention`, `norm` and `swiglu` each use one part. `library` has every import of xformers, and `probe` tries a part on
a device before its first use. The backend that computes retention itself is `retention.backends.xformers`.
"""
