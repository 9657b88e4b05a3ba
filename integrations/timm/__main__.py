"""Runs a script of timm, such as validate.py, inference.py or benchmark.py, with the models of this package.

    python -m retention.integrations.timm validate.py --model rmt_small --checkpoint rmt_small.pth --data-dir imagenet

The scripts are in timm's repository, not in its package. All options after the script are the script's own.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from retention.integrations import timm  # noqa: F401  registers the models


def _main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"the first argument must be a script of timm; got {str(script)!r}, which is no file")
    sys.argv = arguments
    sys.path[0] = str(script.parent)  # as Python does for a script
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    _main(sys.argv[1:])
