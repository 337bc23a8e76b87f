"""What is compiled: the package's own files and bcc's, and nothing else that lies about or is named by a variable."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdp_erm_py import shared
from xdp_erm_py.lab import generate
from xdp_erm_py.program import cache, compiler
from xdp_erm_py.program.compiler import Variant
from xdp_erm_py.program.module import Object
from xdp_erm_py.settings import InterfaceConfig

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 60  # seconds
HOSTILE = "#error read from where it must not be\n"


def compiled() -> Iterator[Object]:
    """All C texts that there are."""
    yield compiler.compiled(compiler.source(compiler.SOURCE), compiler.flags(InterfaceConfig(), Variant((0,), True)))
    yield compiler.compiled(compiler.source(compiler.ARRIVAL_SOURCE), [])
    yield compiler.classifier()
    layout = generate.layout_of(512, 0, False)
    defines = {"IFINDEX": 1, "FLOWS": 1, "SESSIONS": 1, "HEADERS": layout.headers, "SESSION": 34, "FLOW": layout.flow,
               "CHECKSUM": layout.checksum}
    yield compiler.compiled(compiler.source(generate.SOURCE), [f"-DGENERATE_{name}={value}"
                                                               for name, value in defines.items()])


@pytest.fixture(scope="module", autouse=True)
def nothing_kept() -> Iterator[None]:
    """All is compiled here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(cache.VARIABLE, "/proc/nowhere")
        yield


@pytest.fixture(scope="module")
def expected(xdp) -> list[Object]:
    return list(compiled())


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A directory with a header of each name that is included anywhere, all of which end the compilation."""
    headers = [path.relative_to(shared.BPF_DIRECTORY) for path in Path(shared.BPF_DIRECTORY).rglob("*.h")]
    for directory in ("", "include", "include/uapi", "arch/x86/include", "arch/x86/include/generated", "bcc"):
        for header in headers:
            name = header.relative_to("include") if header.parts[0] == "include" else header
            for path in (tmp_path / directory / name, tmp_path / directory / name.name):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(HOSTILE)
    for name in ("helpers.h", "bpf.h", "bpf_workaround.h"):
        (tmp_path / "bcc" / name).write_text(HOSTILE)
        (tmp_path / name).write_text(HOSTILE)
    (tmp_path / "bcc.py").write_text("raise RuntimeError('read from where it must not be')\n")
    return tmp_path


@pytest.mark.check
def test_headers_in_the_current_directory(expected, hostile, monkeypatch):
    monkeypatch.chdir(hostile)
    assert list(compiled()) == expected


def test_a_current_directory_that_is_gone(expected, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    shutil.rmtree(gone)
    assert list(compiled()) == expected


VARIABLES = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "OBJC_INCLUDE_PATH", "BCC_KERNEL_SOURCE", "TMPDIR",
             "TEMP", "TMP", "HOME", "XDG_CONFIG_HOME", "CLANG_CONFIG_FILE_SYSTEM_DIR", "LD_LIBRARY_PATH", "PYTHONPATH",
             "PYTHONHOME", "COMPILER_PATH", "LIBRARY_PATH")
OTHER_VARIABLES = {"BCC_KERNEL_MODULES_SUFFIX": "x", "BCC_LINUX_VERSION_CODE": "1", "ARCH": "arm64",
                   "CCC_OVERRIDE_OPTIONS": "+-m32", "SOURCE_DATE_EPOCH": "x"}


def test_the_environment(expected, hostile, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, str(hostile))
    for name, value in OTHER_VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert list(compiled()) == expected


def test_what_is_opened(expected, hostile):
    """The headers that were just written to a directory in /run, which is gone afterwards."""
    log = hostile / "log"
    text = "from xdp_erm_py.program import compiler; compiler.classifier()"
    strace = ["strace", "--follow-forks", "--trace=openat,open,chdir", "-o", str(log)]
    done = subprocess.run([*strace, sys.executable, "-c", text], cwd=hostile, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    _, _, compiling = log.read_text().partition('chdir("/run/xdp-erm-compile-')
    compiling, _, _ = compiling.partition('chdir("/")')
    # Or looked for: bcc's own headers, which are in its memory, in the root directory, where only root can put any.
    opened = [path for path in re.findall(r'open(?:at)?\((?:AT_FDCWD, )?"([^"]+)"', compiling)
              if not path.startswith("/virtual/")]
    headers = Path(shared.BPF_DIRECTORY, "include").rglob("*.h")
    assert {os.path.normpath(path) for path in opened if path.endswith(".h")} - {"/usr/local/cuda/include/cuda.h"} == {
        str(header.relative_to(shared.BPF_DIRECTORY)) for header in headers}
    # Clang's driver asks what system it is on, and which CUDA and which GCC's libraries there are.
    assert {Path(path).parts[1] for path in opened if path.startswith("/")} <= {
        "..", "etc", "lib", "lib32", "lib64", "opt", "proc", "run", "sys", "usr"}
    assert not list(Path("/run").glob("xdp-erm-compile-*"))


@pytest.mark.parametrize("name", ["xdp_erm.c", "packet.h", "shared.h", "include/linux/types.h", "include/asm/page.h",
                                  "include/uapi/linux/bpf.h"])
def test_the_digest_covers_what_is_compiled(tmp_path, monkeypatch, name):
    before = compiler.digest(InterfaceConfig(), compiler.PLAIN), compiler.classifier_digest()
    assert before == (compiler.digest(InterfaceConfig(), compiler.PLAIN), compiler.classifier_digest())
    shutil.copytree(shared.BPF_DIRECTORY, tmp_path / "bpf")
    monkeypatch.setattr(shared, "BPF_DIRECTORY", tmp_path / "bpf")
    assert before == (compiler.digest(InterfaceConfig(), compiler.PLAIN), compiler.classifier_digest())
    with (tmp_path / "bpf" / name).open("a") as file:
        file.write("/* changed */\n")
    assert compiler.digest(InterfaceConfig(), compiler.PLAIN) != before[0]
    assert (compiler.classifier_digest() != before[1]) == (name not in ("xdp_erm.c", "packet.h"))
