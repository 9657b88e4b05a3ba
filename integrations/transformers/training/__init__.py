"""Training of language models by transformers' Trainer, as the command `retention train` does it."""
