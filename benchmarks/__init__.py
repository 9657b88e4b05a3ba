"""Measurements of this library. Not installed; run `python -m benchmarks` from the root of the repository."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler is loud about missing GPUs
