"""`make bench` measures what it says. How long things take is no matter of tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import Case, cases

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", [name for name, (statement, *_) in cases().items() if "xdp_erm" in statement])
def test_each_frame_gets_the_verdict_of_its_row(xdp: None, name: str) -> None:
    case = Case(*cases()[name])
    case.nanoseconds(1000)
    assert case.counted("not_erm" if name.startswith("not ERM") else "decapsulated") == 1000


def test_the_table_has_every_row(xdp: None, tmp_path: Path) -> None:
    result = tmp_path / "bench.json"
    output = subprocess.run([sys.executable, "-m", "bench", "--quick", "--json", result], cwd=ROOT, text=True,
                            capture_output=True, check=True, timeout=300).stdout
    measured = json.loads(result.read_text())["nanoseconds"]
    assert list(measured) == list(cases())
    assert all(len(values) == 3 and min(values) > 0 for values in measured.values())
    assert all(f"\n{name} " in output for name in measured)
