"""From the C source and a configuration to instructions for the kernel, by bcc. The only file that imports it."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

from . import bpf, shared
from .config import InterfaceConfig
from .errors import XdpErmError

PROGRAM = "xdp_erm"
SOURCE = "xdp_erm.c"
CLASSIFIER, CLASSIFIER_SOURCE = "isolate", "isolate.c"

# BPF_LD | BPF_IMM | BPF_DW with BPF_PSEUDO_MAP_FD as source register: the instruction that names a map.
_LOAD_MAP = (0x18, 1)


def flags(config: InterfaceConfig) -> list[str]:
    """The -D options that specialise the program; what they mean stands at the top of the C source."""
    ports = " || ".join(f"(port) == {port}" for port in config.port)
    vlan = shared.VLAN_MODES[config.vlan]
    defines = [f"ERM_IS_PORT(port)=({ports})", f"ERM_DEPTH={config.depth}", f"ERM_VLAN={vlan}"]
    if config.sources:
        defines.append(f"ERM_SOURCES={len(config.sources)}")
    if config.targets:
        defines.append(f"ERM_TARGETS={len(config.targets)}")
    if config.sessions:
        defines.append("ERM_SESSIONS")
    if config.isolate:
        defines.append("ERM_ISOLATE")
    return ["-D" + define for define in defines]


def digest(config: InterfaceConfig) -> str:
    """Tells programs apart: the same for the same source and the same configuration of the program itself."""
    text = b"".join(map(source, (SOURCE, "shared.h", "packet.h")))
    words = "\n".join([*flags(config), *config.sources, *config.targets])
    return hashlib.sha256(text + words.encode()).hexdigest()[:16]


def _import_bcc() -> Any:
    try:
        import bcc
    except ImportError:
        bcc = None
    if not hasattr(bcc, "BPF"):  # PyPI has an unrelated package of the same name
        raise XdpErmError("bcc is missing for this Python: install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
                          "(RHEL, Fedora)")
    return bcc


def source(name: str) -> bytes:
    """One of the sources in bpf/."""
    text: bytes = (shared.BPF_DIRECTORY / name).read_bytes()
    return text


def module(text: bytes, options: list[str]) -> Any:
    """Has bcc compile C text, which may include what is in bpf/, and make its maps.

    The caller calls its cleanup(). XdpErmError: it does not compile.
    """
    bcc = _import_bcc()
    # bcc wants a directory, and in a .pyz the sources are none.
    with tempfile.TemporaryDirectory(prefix="xdp-erm-") as directory:
        _copy(shared.BPF_DIRECTORY, Path(directory))
        # The project's own header tree: whatever the running kernel's headers are, they are not needed.
        outer = os.environ.get("BCC_KERNEL_SOURCE")
        os.environ["BCC_KERNEL_SOURCE"] = directory
        try:
            return bcc.BPF(text=text, cflags=[f"-I{directory}", *options])
        except Exception as error:
            raise XdpErmError(f"the program does not compile: {error}") from None
        finally:
            os.environ.pop("BCC_KERNEL_SOURCE")
            if outer is not None:
                os.environ["BCC_KERNEL_SOURCE"] = outer


def function(compiled: Any, name: str) -> tuple[bytes, bytes]:
    """A function's instructions, and its licence."""
    return compiled.dump_func(name.encode()), _import_bcc().lib.bpf_module_license(compiled.module)


def classifier() -> tuple[bytes, bytes]:
    """The instructions of bpf/isolate.c, and their licence. It is the same in each configuration."""
    compiled = module(source(CLASSIFIER_SOURCE), [])
    try:
        return function(compiled, CLASSIFIER)
    finally:
        compiled.cleanup()


class Compiled:
    """A compiled program and the maps made for it, which are gone after the with block unless a program holds them.

    Needs root, because bcc makes the maps at once. `options` go to the C compiler, after the configuration's own.
    """

    def __init__(self, config: InterfaceConfig, options: tuple[str, ...] = ()) -> None:
        self._module = module(source(SOURCE), [*flags(config), *options])
        self._instructions, self._license = function(self._module, PROGRAM)
        names = ["counters"]
        for name, addresses in (("sources", config.sources), ("targets", config.targets)):
            if addresses:
                names.append(name)
                fill(self._module[name.encode()].map_fd, addresses)
        if config.sessions:
            names += ["own_sessions", "sessions"]
        self.maps: dict[str, int] = {name: self._module[name.encode()].map_fd for name in names}

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        self._module.cleanup()

    def map_info(self, name: str) -> bpf.MapInfo:
        """The shape of one of `maps`."""
        with bpf.Map(os.dup(self.maps[name])) as map_:
            return map_.info

    def load(self, carried: dict[str, int]) -> int:
        """Loads the program and returns its descriptor; it uses the maps in `carried` in place of its own."""
        replaced = {self.maps[name]: fd for name, fd in carried.items()}
        instructions = bytearray(self._instructions)
        for offset in range(0, len(instructions), 8):
            code, registers, _, immediate = struct.unpack_from("=BBhi", instructions, offset)
            if (code, registers >> 4) == _LOAD_MAP and immediate in replaced:
                struct.pack_into("=i", instructions, offset + 4, replaced[immediate])
        return bpf.load_xdp(PROGRAM, bytes(instructions), self._license)


def _copy(source: Any, directory: Path) -> None:
    for entry in source.iterdir():
        if entry.is_dir():
            (directory / entry.name).mkdir()
            _copy(entry, directory / entry.name)
        else:
            (directory / entry.name).write_bytes(entry.read_bytes())


def fill(fd: int, addresses: tuple[str, ...]) -> None:
    """Puts prefixes into an allow list: the length in bits, then the address in network byte order."""
    for address in addresses:
        network = ipaddress.IPv4Network(address)
        bpf.update(fd, struct.pack("=I4s", network.prefixlen, network.network_address.packed), b"\1")
