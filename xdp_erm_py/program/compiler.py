"""From the C source and a configuration to instructions for the kernel, by bcc. The only file that imports it."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import shared
from ..config import InterfaceConfig
from ..errors import XdpErmError
from ..kernel import bpf

PROGRAM = "xdp_erm"
SOURCE = "xdp_erm.c"
ARRIVAL, ARRIVAL_SOURCE = "arrive", "arrive.c"
CLASSIFIER, CLASSIFIER_SOURCE = "isolate", "isolate.c"

#: Prefixes of an allow list that are compared one by one: that costs less than a look-up in a map.
MOST_COMPARED = 8

# BPF_LD | BPF_IMM | BPF_DW with BPF_PSEUDO_MAP_FD as source register: the instruction that names a map.
_LOAD_MAP = (0x18, 1)


class Variant(NamedTuple):
    """What the program depends on besides the configuration."""

    cpus: tuple[int, ...] = ()
    """That it hands decapsulated frames to."""
    frags: bool = False
    """Whether it takes frames that lie in several pieces of memory, as jumbo frames do."""


#: Frames stay on the CPU they came to, and each lies in one piece.
PLAIN = Variant()


def flags(config: InterfaceConfig, variant: Variant = PLAIN) -> list[str]:
    """The -D options that specialise the program; what they mean stands at the top of the C source."""
    ports = " || ".join(f"(port) == {port}" for port in config.port)
    vlan = shared.VLAN_MODES[config.vlan]
    defines = [f"ERM_IS_PORT(port)=({ports})", f"ERM_DEPTH={config.depth}", f"ERM_VLAN={vlan}"]
    for name, addresses in (("SOURCE", config.sources), ("TARGET", config.targets)):
        if _is_long(addresses):
            defines.append(f"ERM_{name}S={len(addresses)}")
        else:
            defines.append(f"ERM_IS_{name}(address)={_comparison(addresses)}")
    if config.sources or config.targets:
        defines.append("ERM_SENDERS")
    if config.sessions:
        defines.append("ERM_SESSIONS")
    if config.isolate:
        defines.append("ERM_ISOLATE")
    if variant.cpus:
        defines += [f"ERM_LANES={len(variant.cpus)}", f"ERM_CPUS={bpf.possible_cpus()}"]
        if config.spread_ports:
            defines.append("ERM_SPREAD_PORTS")
    if variant.frags:
        defines.append("ERM_FRAGS")
    return ["-D" + define for define in defines]


def _is_long(addresses: tuple[str, ...]) -> bool:
    """Whether an allow list is too long for its prefixes to be compared one by one, so that it is a map."""
    return len(addresses) > MOST_COMPARED


def _comparison(addresses: tuple[str, ...]) -> str:
    """C: whether `address`, in network byte order, is within one of the prefixes; there being none, it is."""
    compared = []
    for address in addresses:
        network = ipaddress.IPv4Network(address)
        mask, value = (int.from_bytes(part.packed, sys.byteorder)
                       for part in (network.netmask, network.network_address))
        compared.append(f"((address) & {mask:#x}) == {value:#x}")
    return f"({' || '.join(compared) or '1'})"


def digest(config: InterfaceConfig, variant: Variant) -> str:
    """Tells programs apart: the same for the same source and the same configuration of the program itself."""
    sources = [SOURCE, "shared.h", "packet.h"]
    words = [*flags(config, variant), *config.sources, *config.targets]
    if variant.cpus:
        sources.append(ARRIVAL_SOURCE)
        words += [str(config.spread_queue), *map(str, variant.cpus)]
    text = b"".join(map(source, sources)) + "\n".join(words).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def _import_bcc() -> Any:
    try:
        import bcc
    except ImportError:
        bcc = None
    if not hasattr(bcc, "BPF"):  # PyPI has an unrelated package of the same name
        raise XdpErmError("bcc is missing for this Python: install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
                          "(RHEL, Fedora)")
    return bcc


def bcc_version() -> str:
    """XdpErmError: there is no bcc."""
    version: str = _import_bcc().__version__
    return version


def source(name: str) -> bytes:
    """One of the sources in bpf/."""
    text: bytes = (shared.BPF_DIRECTORY / name).read_bytes()
    return text


def module(text: bytes, options: list[str]) -> Any:
    """Has bcc compile C text, which may include what is in bpf/, and make its maps.

    The caller calls its cleanup(). XdpErmError: it does not compile.
    """
    bcc = _import_bcc()
    with _sources() as directory:
        # The project's own header tree: whatever the running kernel's headers are, they are not needed.
        outer = os.environ.get("BCC_KERNEL_SOURCE")
        os.environ["BCC_KERNEL_SOURCE"] = str(directory)
        try:
            return bcc.BPF(text=text, cflags=[f"-I{directory}", *options])
        except Exception as error:
            raise XdpErmError(f"the program does not compile: {error}") from None
        finally:
            os.environ.pop("BCC_KERNEL_SOURCE")
            if outer is not None:
                os.environ["BCC_KERNEL_SOURCE"] = outer


@contextlib.contextmanager
def _sources() -> Iterator[Path]:
    """The directory of the C sources, a copy only where they are in a .pyz: a killed command would leave it behind."""
    if isinstance(shared.BPF_DIRECTORY, Path):
        yield shared.BPF_DIRECTORY
    else:
        with tempfile.TemporaryDirectory(prefix="xdp-erm-") as directory:
            _copy(shared.BPF_DIRECTORY, Path(directory))
            yield Path(directory)


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


def classifier_digest() -> str:
    """Tells filters apart: the same for the same source."""
    return hashlib.sha256(source(CLASSIFIER_SOURCE) + source("shared.h")).hexdigest()[:8]


class Compiled:
    """A compiled program and the maps made for it, which are gone after the with block unless a program holds them.

    Needs root, because bcc makes the maps at once. `options` go to the C compiler, after the configuration's own.
    """

    def __init__(self, config: InterfaceConfig, variant: Variant = PLAIN, options: tuple[str, ...] = ()) -> None:
        self._config, self._variant = config, variant
        with contextlib.ExitStack() as stack:
            self._program = module(source(SOURCE), [*flags(config, variant), *options])
            stack.callback(self._program.cleanup)
            self.maps = self._own_maps()
            if variant.cpus:
                self._arrival = module(source(ARRIVAL_SOURCE), [])
                stack.callback(self._arrival.cleanup)
                self.maps["arrived"] = self._arrival[b"arrived"].map_fd
            fill(self._program, config, variant)
            self._stack = stack.pop_all()

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _own_maps(self) -> dict[str, int]:
        names = ["counters"]
        names += ["sources"] if _is_long(self._config.sources) else []
        names += ["targets"] if _is_long(self._config.targets) else []
        names += ["senders"] if self._config.sources or self._config.targets else []
        names += ["own_sessions", "sessions"] if self._config.sessions else []
        names += ["cpus", "lanes", "steered"] if self._variant.cpus else []
        return {name: self._program[name.encode()].map_fd for name in names}

    def map_info(self, name: str) -> bpf.MapInfo:
        """The shape of one of `maps`."""
        with bpf.Map(os.dup(self.maps[name])) as map_:
            return map_.info

    def load(self, carried: dict[str, int]) -> int:
        """Loads the program and returns its descriptor; it uses the maps in `carried` in place of its own.

        OSError: the kernel refuses it, or has not the memory for a CPU's queue.
        """
        frags = self._variant.frags
        if self._variant.cpus and "cpus" not in carried:
            arrival = bpf.load_xdp(ARRIVAL, *self._instructions(self._arrival, ARRIVAL, carried), frags,
                                   cpumap=True)
            try:
                for cpu in self._variant.cpus:
                    bpf.update(self.maps["cpus"], struct.pack("=I", cpu),
                               struct.pack("=Ii", self._config.spread_queue, arrival))
            finally:
                os.close(arrival)
        program = bpf.load_xdp(PROGRAM, *self._instructions(self._program, PROGRAM, carried), frags)
        if self._variant.cpus:
            # Only the other CPUs' program uses it, and it is through this one that it is found.
            bpf.bind_map(program, carried.get("arrived", self.maps["arrived"]))
        return program

    def _instructions(self, compiled: Any, name: str, carried: dict[str, int]) -> tuple[bytes, bytes]:
        """A function's instructions, with the maps in `carried`, and its licence."""
        replaced = {self.maps[name]: fd for name, fd in carried.items()}
        text, license = function(compiled, name)
        instructions = bytearray(text)
        for offset in range(0, len(instructions), 8):
            code, registers, _, immediate = struct.unpack_from("=BBhi", instructions, offset)
            if (code, registers >> 4) == _LOAD_MAP and immediate in replaced:
                struct.pack_into("=i", instructions, offset + 4, replaced[immediate])
        return bytes(instructions), license


def _copy(source: Any, directory: Path) -> None:
    for entry in source.iterdir():
        if entry.is_dir():
            (directory / entry.name).mkdir()
            _copy(entry, directory / entry.name)
        else:
            (directory / entry.name).write_bytes(entry.read_bytes())


def fill(compiled: Any, config: InterfaceConfig, variant: Variant) -> None:
    """Puts into a compiled program's maps what it only reads: long allow lists, and the CPUs that take part."""
    for name, addresses in ((b"sources", config.sources), (b"targets", config.targets)):
        if _is_long(addresses):
            for network in map(ipaddress.IPv4Network, addresses):
                # The length in bits, then the address in network byte order.
                prefix = struct.pack("=I4s", network.prefixlen, network.network_address.packed)
                bpf.update(compiled[name].map_fd, prefix, b"\1")
    for lane, cpu in enumerate(variant.cpus):
        bpf.update(compiled[b"lanes"].map_fd, struct.pack("=I", lane), struct.pack("=I", cpu))
