"""Runs the btests, which need Zeek, each as a test of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DIRECTORY = REPOSITORY / "tests" / "btest"
TESTS = sorted(str(path.relative_to(DIRECTORY)) for path in DIRECTORY.glob("*/*.zeek") if path.parent.name != "Scripts")
PATH = os.pathsep.join([os.environ["PATH"], "/opt/zeek/bin", "/usr/local/zeek/bin"])
BTEST = shutil.which("btest", path=PATH)


@pytest.mark.parametrize("name", TESTS)
def test_btest(name: str) -> None:
    if not BTEST or not shutil.which("zeek", path=PATH):
        pytest.skip("no Zeek with btest on PATH or in /opt/zeek")
    done = subprocess.run([BTEST, "--diagnostics", str(DIRECTORY / name)], cwd=REPOSITORY,
                          env={**os.environ, "PATH": PATH}, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    if "skipped" in said:
        pytest.skip(f"the test's @TEST-REQUIRES: {said.strip()}")
    assert done.returncode == 0, said
