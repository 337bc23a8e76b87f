"""What the checkers say: ruff, mypy and clang must have nothing to complain of."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from xdp_erm_py import shared
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.program.compiler import Compiled, Variant
from xdp_erm_py.settings import InterfaceConfig

pytestmark = pytest.mark.check

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds

# -Wno-unused-parameter: bcc makes inline functions of its own with parameters they do not use.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter")

CONFIGURATIONS = {
    "default": InterfaceConfig(),
    "least": InterfaceConfig(vlan="strip", sessions=False),
    "most": InterfaceConfig(port=(1, 7932, 65535), vlan="tagged", depth=3, sources=("10.0.0.0/8", "192.0.2.1/32"),
                            targets=("192.0.2.1",), spread_ports=True),
    "each encapsulation": InterfaceConfig(
        encapsulations=shared.ENCAPSULATIONS, depth=3, spread_ports=True,
        sources=tuple(f"10.{number}.0.0/16" for number in range(9)) + ("2001:db8::/32",),
        targets=("192.0.2.1", "2001:db8::1")),
}


@pytest.mark.parametrize("checker, arguments", [
    ("ruff", ["check", "--no-cache", "--quiet", "."]),
    ("mypy", ["--cache-dir=/dev/null"]),
], ids=["ruff", "mypy"])
def test_python(checker, arguments):
    """What they check, and how strictly, stands in pyproject.toml."""
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"no {checker} for {sys.executable}: `make test` installs it")
    done = subprocess.run([sys.executable, "-m", checker, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("variant", [Variant(), Variant(frags=True), Variant(frags=True, pull=True), Variant((0,)),
                                     Variant((0,), True)], ids=["plain", "frags", "pull", "cpumap", "cpumap and frags"])
@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_c(xdp, config, variant):
    with Compiled(config, variant, WARNINGS):
        pass


def test_warnings_in_c_are_errors(xdp, capfd):
    with pytest.raises(XdpErmError, match="does not compile"):
        Compiled(InterfaceConfig(), options=(*WARNINGS, "-DCONFIG_DEPTH=2"))
    assert "macro redefined" in capfd.readouterr().err
