"""A shell command of a test."""

from __future__ import annotations

import subprocess

TIMEOUT = 60  # seconds


def shell(command: str) -> str:
    """Its output. CalledProcessError: it fails."""
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=TIMEOUT, check=True).stdout
