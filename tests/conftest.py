"""What the tests of the XDP program share: programs compiled once, and a cable between two network namespaces."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
from program import Program

from xdp_erm_py.config import InterfaceConfig
from xdp_erm_py.kernel import bpf
from xdp_erm_py.lab.cable import Cable

DEFAULT = InterfaceConfig()


@pytest.fixture(scope="session")
def xdp() -> None:
    """Skips the test where XDP programs cannot be compiled and loaded."""
    if os.geteuid() != 0:
        pytest.skip("XDP programs need root")
    if importlib.util.find_spec("bcc") is None:
        pytest.skip("no bcc for this Python: install python3-bpfcc (Debian, Ubuntu) or python3-bcc (RHEL, Fedora)")
    try:
        with bpf.Map.create_array("probe", 8):
            pass
    except OSError as error:
        pytest.skip(f"this kernel gives no BPF: {error.strerror}")


@pytest.fixture(scope="session")
def program(xdp: None) -> Iterator[Callable[..., Program]]:
    """program(config, *compiler_options): loaded, and kept for all tests, as compiling takes a third of a second."""
    with contextlib.ExitStack() as stack:
        @functools.cache
        def load(config: InterfaceConfig = DEFAULT, *options: str) -> Program:
            return stack.enter_context(Program(config, options))
        yield load


@pytest.fixture
def cable(xdp: None) -> Iterator[Cable]:
    """A cable from a switch to a sensor; the test runs in the sensor's network namespace."""
    with Cable() as cable, cable.sensor.entered():
        yield cable


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the run with one plain line, which is easier for programs than pytest's own."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not config.option.collectonly:
        count = {kind: len(reporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
        print(f"{count['passed']} passed, {count['failed'] + count['error']} failed, {count['skipped']} skipped")
