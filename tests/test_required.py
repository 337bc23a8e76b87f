"""XDP_ERM_REQUIRE: what must be there is no reason to skip a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SKIPS = """
import pytest

def test_zeek():
    pytest.skip("no Zeek on PATH")

@pytest.mark.skipif(True, reason="no bcc for this Python")
def test_bcc():
    pass

def test_nothing():
    pass
"""


@pytest.mark.parametrize("required, last_lines", [
    ("", ["skipped: no Zeek on PATH", "skipped: no bcc for this Python", "1 passed, 0 failed, 2 skipped"]),
    ("qemu, zeek", ["skipped: no bcc for this Python", "1 passed, 1 failed, 1 skipped"]),
])
def test_a_skip_for_want_of_it_fails(tmp_path: Path, required: str, last_lines: list[str]) -> None:
    (tmp_path / "test_skips.py").write_text(SKIPS)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)],
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "XDP_ERM_REQUIRE": required},
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-len(last_lines):] == last_lines, done.stdout + done.stderr
    assert done.returncode == (0 if " 0 failed" in last_lines[-1] else 1)
