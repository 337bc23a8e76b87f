"""What tests share: a /run of their own, programs compiled once, and a cable between two network namespaces."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
from machine import ZEEK
from program import Program

from xdp_erm_py.kernel import bpf
from xdp_erm_py.lab.cable import Cable
from xdp_erm_py.program import cache
from xdp_erm_py.settings import InterfaceConfig
from zeekctl import build

DEFAULT = InterfaceConfig()
#: Where all runs of tests keep what was compiled; `make clean` removes it.
KEPT = "/var/cache/xdp-erm-tests"
#: What must be there, such as zeek, bcc, qemu: a test that skips for want of it, "no Zeek ...", fails.
REQUIRED = os.environ.get("XDP_ERM_REQUIRE", "").lower().replace(",", " ").split()
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


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


@pytest.fixture(scope="session")
def zeekctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """The plugin's module as it is built, with zeekctl's own beside it; for tests that need Zeek."""
    assert ZEEK is not None
    directory = tmp_path_factory.mktemp("plugin")
    build.build(directory)
    with mock.patch.object(sys, "path", [*sys.path, str(ZEEK / "lib" / "zeek" / "python" / "zeekctl")]):
        spec = importlib.util.spec_from_file_location("xdp_erm_zeekctl", directory / build.PLUGIN)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def pytest_configure(config: pytest.Config) -> None:
    # A job in the background may ignore Ctrl-C, and what it starts, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(PermissionError):
        _have_own_run()
    os.environ.setdefault(cache.VARIABLE, KEPT)


def _have_own_run() -> None:
    """Locks, pid files and names of network namespaces are in /run. Those of this process are not another's."""
    _check(_libc.unshare(CLONE_NEWNS))
    _check(_libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    _check(_libc.mount(b"run", b"/run", b"tmpfs", 0, None))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped."""
    _, _, reason = report.longrepr  # type: ignore[misc]
    return reason.removeprefix("Skipped: ")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = (yield).get_result()
    if report.skipped and _reason(report).lower().startswith(tuple(f"no {name}" for name in REQUIRED)):
        report.longrepr, report.outcome = f"XDP_ERM_REQUIRE: {_reason(report)}", "failed"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the run with plain lines, easier for programs than pytest's own: why tests were skipped, and the count."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    count = {kind: len(reporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
    for missing in sorted({_reason(report) for report in reporter.stats.get("skipped", [])}):
        print(f"skipped: {missing}")
    print(f"{count['passed']} passed, {count['failed'] + count['error']} failed, {count['skipped']} skipped")
