"""Tells what the newest version of everything breaks here. Run it with the python of an environment of constraints.txt.

It asks pip what is newer than constraints.txt without the upper bounds of pyproject.toml, lays that over the
environment in a folder of its own, and runs the tests of integrations that touch transformers or timm. What another
library broke is told, not failed for: the bounds keep it from users, and it may be that library's to mend. It fails
when pip finds no versions that go together, or cannot install them: a plain `pip install` would fail too.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along there

ROOT = Path(__file__).parents[1]


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", *arguments], check=True)


def wanted():
    """What pyproject.toml asks for, without upper bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(line)
        if requirement.name != project["name"]:
            kept = [str(bound) for bound in requirement.specifier if bound.operator != "<"]
            requirement.specifier = SpecifierSet(",".join(kept))
            yield str(requirement)


def newer(folder):
    """Name and version of all that pip would change in this environment."""
    report = folder / "report.json"
    pip("--dry-run", "--upgrade", "--upgrade-strategy", "eager", "--report", report, *wanted())
    found = (package["metadata"] for package in json.loads(report.read_text())["install"])
    return {canonicalize_name(package["name"]): package["version"] for package in found}


def failures(overlay):
    """The lines in which pytest names what failed with these versions."""
    files = sorted(file for folder in ("integrations", "cli") for file in (ROOT / "tests" / folder).glob("test_*.py"))
    touching = [path for path in files if re.search(r"\b(transformers|timm)\b", path.read_text())]
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *touching]
    environment = os.environ | {"PYTHONPATH": str(overlay)}
    named = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            print(line, end="", flush=True)
            if line.startswith(("FAILED ", "ERROR ")):
                named.append(line.strip())
    return named or ([f"pytest could not run: it ended with {run.returncode}"] if run.returncode else [])


def main():
    pins = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    with tempfile.TemporaryDirectory() as folder:
        found = newer(Path(folder))
        moved = [f"  {name} {found[name]}, tested: {pins[name]}" for name in sorted(found.keys() & pins.keys())]
        if not moved:
            print("nothing is newer than constraints.txt")
            return
        print("Newer than constraints.txt:", *moved, sep="\n")
        overlay = Path(folder, "overlay")
        pip("--no-deps", "--target", overlay, *(f"{name}=={version}" for name, version in found.items()))
        broken = failures(overlay)
    print("\nNewer than constraints.txt:", *moved, sep="\n")
    print(f"Tests that fail with these: {len(broken)}", *broken, sep="\n  ")
    print("CI does not fail for them." if broken else "It is time for .ci/renew.")


if __name__ == "__main__":
    main()
