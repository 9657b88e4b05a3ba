"""Training of language models with transformers' Trainer, for `retention train` and `retention swap`."""
