"""Runs the btests, which need Zeek, each as a test of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DIRECTORY = REPOSITORY / "tests" / "btest"
TESTS = sorted(str(path.relative_to(DIRECTORY)) for path in DIRECTORY.glob("*/*.zeek") if path.parent.name != "Scripts")
PATH = os.pathsep.join([os.environ["PATH"], "/opt/zeek/bin", "/usr/local/zeek/bin"])
BTEST = shutil.which("btest", path=PATH)
TIMEOUT = 540  # seconds: one starts Zeek a hundred times, each a few seconds on a busy machine

# Ports of its own, and nothing that it leaves running outlives it.
ALONE = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
         "sh", "-c", 'ip link set lo up && exec "$@"', "sh"] if os.geteuid() == 0 else []


@pytest.mark.parametrize("name", TESTS)
def test_btest(name: str) -> None:
    if not BTEST or not shutil.which("zeek", path=PATH):
        pytest.skip("no Zeek with btest on PATH or in /opt/zeek")
    with tempfile.TemporaryDirectory(prefix="btest-") as directory:  # has a socket that is named for a process id
        done = subprocess.run([*ALONE, BTEST, "--diagnostics", str(DIRECTORY / name)], cwd=REPOSITORY,
                              env={**os.environ, "PATH": PATH, "TMPDIR": directory}, capture_output=True, text=True,
                              timeout=TIMEOUT)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    if re.search(r"^0 tests successful, 1 skipped$", said, re.MULTILINE):
        required = re.findall("@TEST-REQUIRES: (.*)", (DIRECTORY / name).read_text())
        pytest.skip(f"{name} requires: {'; '.join(required)}")


def test_what_a_failing_btest_leaves_running_ends(tmp_path: Path) -> None:
    """As btest-bg-run leaves it: the number of the process that leads a group, and no exit code."""
    (tmp_path / "zeek").mkdir()
    left = subprocess.Popen(["sh", "-c", "sleep 300; true"], start_new_session=True, stdout=subprocess.PIPE)
    (tmp_path / "zeek" / ".pid").write_text(f"{left.pid}\n")
    subprocess.run([DIRECTORY / "Scripts" / "end-what-runs"], cwd=tmp_path, check=True, timeout=TIMEOUT)
    left.communicate(timeout=30)  # the sleep has it open, too
