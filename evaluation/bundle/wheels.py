"""The packages that another machine lacks, as wheels for it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scq.engine.errors import UserError
from scq.engine.progress import say

PAGE = frozenset({"gradio"})  # only the page needs it
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64")
_OLDER = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")


def read_packages(file: Path) -> dict[str, str]:
    """Packages as ``pip list`` or ``pip freeze`` shows them, one on a line: versions by name, "" where none is given.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list of packages {file} cannot be read: {error}") from error
    found = {}
    for line in lines:
        words = re.split(r"\s*==\s*|\s+", line.split("#")[0].strip())
        if words[0] and not set(words[0]) <= {"-"} and words[0] != "Package":
            found[canonicalize_name(words[0])] = words[1] if len(words) > 1 else ""
    return found


def lacking(there: Mapping[str, str], python: str, without: Iterable[str] = PAGE) -> dict[str, str]:
    """What scq needs, directly or not, and a machine does not have: versions by name, those that are installed here.

    Args:
        there: the machine's packages, as `read_packages` gives them; one without a version is trusted to fit.
        python: its version of Python, such as "3.12".
        without: packages that are left out with all that only they need.
    """
    environment = {key: str(value) for key, value in default_environment().items()} | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "extra": "",
    }
    needed: dict[str, str] = {}
    queue, seen = [Requirement("scq")], set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        version = None if name == "scq" else there.get(name)  # the bundle brings scq itself
        fits = version is not None and (not version or requirement.specifier.contains(version, prereleases=True))
        if name in without or fits or (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        installed = metadata.distribution(requirement.name)
        if version is not None:
            say(f"{name} {version} there is not {requirement.specifier}: {installed.version} comes along")
        if name != "scq":
            needed[name] = installed.version
        for text in installed.requires or []:
            inner = Requirement(text)
            extras = ("", *requirement.extras)
            if inner.marker is None or any(inner.marker.evaluate(environment | {"extra": each}) for each in extras):
                queue.append(inner)
    return needed


def download(packages: Mapping[str, str], python: str, folder: Path) -> list[Path]:
    """Wheels of these packages, for Linux on x86-64.

    Raises:
        UserError: pip finds no wheel of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for each in (*_PLATFORMS, *_OLDER) for word in ("--platform", each)]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    for name, version in packages.items():
        wanted = f"{name}=={version}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, *target, "-d", folder, wanted], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"pip finds no wheel of {wanted} for Python {python}: {done.stderr.strip()[-300:]}")
    return sorted(folder.glob("*.whl"))
