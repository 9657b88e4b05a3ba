"""Measurements of this library. Not installed; run `python -m benchmarks` from the root of the repository."""
