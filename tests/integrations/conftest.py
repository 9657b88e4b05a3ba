"""Fixtures of `runs`."""

from short_runs import bpe, cache, settings, small, text, tokenizer, tokenizer_folder

__all__ = ["bpe", "cache", "settings", "small", "text", "tokenizer", "tokenizer_folder"]
