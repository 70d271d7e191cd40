# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The wheel of this checkout, and environments into which it is installed alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: What makes the wheel; a copy, since setuptools leaves its build beside it.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "components/src")

#: Installing may download what the lock does not have yet.
INSTALL_SECONDS = 300.0


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment in ``root``."""

    root: Path

    @property
    def python(self) -> str:
        return str(self.root / "bin" / "python")

    @property
    def command(self) -> str:
        """The console entry point."""
        return str(self.root / "bin" / "dynamo-refit")

    @classmethod
    def make(cls, root: Path) -> CleanEnvironment:
        uv("venv", "--python", sys.executable, root)
        return cls(root)

    def install(self, *arguments: object) -> None:
        uv("pip", "install", "--python", self.python, *arguments)


def build_wheel(directory: Path) -> Path:
    """As the Makefile installs the checkout: without isolation, so without setuptools
    from elsewhere."""
    checkout = directory / "checkout"
    for source in SOURCES:
        target = checkout / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / source, target, ignore=ignored)
        else:
            shutil.copy(ROOT / source, target)
    uv(
        *("build", "--wheel", "--no-build-isolation", "--python", sys.executable),
        *("--out-dir", directory, checkout),
    )
    (wheel,) = directory.glob("*.whl")
    return wheel


def uv(*arguments: object) -> None:
    """Run uv, and fail with what it says."""
    ended = subprocess.run(
        [_uv(), "--quiet", *map(str, arguments)],
        env={**os.environ, **_wheel_source(os.environ)},
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
    )
    assert ended.returncode == 0, f"uv {' '.join(map(str, arguments))}: {ended.stderr}"


def _uv() -> str:
    """The uv that `make setup` has used for the environment that runs this."""
    own = Path(sys.prefix).parent / ".venv-tools" / "bin" / "uv"
    found = shutil.which("uv") or (str(own) if own.exists() else None)
    assert found, "no uv: make setup"
    return found


def _wheel_source(environment: Mapping[str, str]) -> dict[str, str]:
    """As in the Makefile: local wheels of pip's configuration, which uv does not read;
    where there are none, uv's own switch picks the CPU build of torch."""
    links = environment.get("UV_FIND_LINKS") or environment.get("PIP_FIND_LINKS")
    if not links:
        base = Path(sys.base_prefix) / "bin" / "python3"
        asked = [base, "-m", "pip", "config", "get", "global.find-links"]
        links = subprocess.run(asked, capture_output=True, text=True).stdout
    if not links.strip():
        return {"UV_TORCH_BACKEND": "cpu"}
    return {"UV_FIND_LINKS": ",".join(links.split())}
