"""Runs a script of timm's repository, such as validate.py, inference.py or benchmark.py, with the models that this
package registers. All options after the script are the script's own:

    python -m retention.integrations.timm validate.py --model rmt_small --checkpoint rmt_small.pth --data-dir imagenet
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from retention.integrations import timm  # noqa: F401  registers the models


def _main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m retention.integrations.timm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="a script of timm's repository, which its package does not have")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the script")
    given = parser.parse_args(arguments)
    if not given.script.is_file():
        parser.error(f"script must be a file, such as timm's validate.py; got {str(given.script)!r}")
    sys.argv = [str(given.script), *given.options]
    sys.path[0] = str(given.script.parent)  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main()
