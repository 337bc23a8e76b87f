"""From the C sources and a configuration to a program that can be loaded."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from .. import shared
from ..errors import XdpErmError
from ..kernel import bpf
from ..settings import InterfaceConfig
from . import cache
from .encapsulations import ENCAPSULATIONS
from .module import Module, Object

PROGRAM = "xdp_erm"
SOURCE = "xdp_erm.c"
ARRIVAL, ARRIVAL_SOURCE = "arrive", "arrive.c"
CLASSIFIER, CLASSIFIER_SOURCE = "isolate", "isolate.c"

#: Prefixes of an allow list that are compared one by one: that costs less than a look-up in a map.
MOST_COMPARED = 8

# A header of the project's own in bpf/, and beneath that those which bcc asks for.
_INCLUDE = re.compile(r'^#include "([\w./]+)"$', re.MULTILINE)
_HEADERS = "include"


class Variant(NamedTuple):
    """What the program depends on besides the configuration."""

    cpus: tuple[int, ...] = ()
    """That it hands decapsulated frames to."""
    frags: bool = False
    """Whether it takes frames that lie in several pieces of memory, as jumbo frames do."""
    pull: bool = False
    """Whether it has the kernel put headers that lie in several into one (Linux 6.18)."""


#: Frames stay on the CPU they came to, and each lies in one piece.
PLAIN = Variant()


def flags(config: InterfaceConfig, variant: Variant = PLAIN) -> list[str]:
    """The -D options that specialise the program; what they mean stands at the top of the C source."""
    wanted = [ENCAPSULATIONS[name] for name in config.encapsulations]
    defines = [f"CONFIG_DEPTH={config.depth}", f"CONFIG_VLAN={shared.VLAN_MODES[config.vlan]}"]
    for each in ENCAPSULATIONS.values():
        if each.setting:
            ports = getattr(config, each.setting) if each in wanted else ()
            compared = " || ".join(f"(port) == {port}" for port in ports) or "0"
            defines.append(f"CONFIG_IS_{each.name.upper()}_PORT(port)=({compared})")
    transports = {each.transport for each in wanted}
    for name, on in (("ERSPAN", "erspan" in config.encapsulations), ("PLAIN_GRE", "gre" in config.encapsulations),
                     ("UDP", "udp" in transports), ("GRE", "gre" in transports)):
        defines.append(f"CONFIG_{name}={int(on)}")
    if _is_mixed(config):
        defines.append("CONFIG_MIXED")
    for name, addresses in (("SOURCE", config.sources), ("TARGET", config.targets)):
        if _is_long(addresses):
            defines.append(f"CONFIG_{name}S={len(_prefixes(addresses, _is_mixed(config)))}")
        else:
            defines.append(f"CONFIG_IS_{name}(words)={_comparison(addresses, _is_mixed(config))}")
    if config.sources or config.targets:
        defines.append("CONFIG_SENDERS")
    if config.sessions:
        defines.append("CONFIG_SESSIONS")
    if config.isolate:
        defines.append("CONFIG_ISOLATE")
    if variant.cpus:
        defines += [f"CONFIG_LANES={len(variant.cpus)}", f"CONFIG_CPUS={bpf.possible_cpus()[-1] + 1}"]
        if config.spread_ports:
            defines.append("CONFIG_SPREAD_PORTS")
    if variant.frags:
        defines.append("CONFIG_FRAGS")
    if variant.pull:
        defines.append("CONFIG_PULL")
    return ["-D" + define for define in defines]


def _is_long(addresses: tuple[str, ...]) -> bool:
    """Whether an allow list is too long for its prefixes to be compared one by one, so that it is a map."""
    return len(addresses) > MOST_COMPARED


def _is_mixed(config: InterfaceConfig) -> bool:
    """Whether there can be more than ERM."""
    return config.encapsulations != ("erm",)


def _prefixes(addresses: tuple[str, ...], is_mixed: bool) -> list[tuple[int, bytes]]:
    """Length and address as the program looks them up: 32 bits, or 128, of which IPv4 has ::ffff:0:0/96 for itself."""
    prefixes = []
    for network in map(ipaddress.ip_network, addresses):
        if isinstance(network, ipaddress.IPv6Network) and network.supernet_of(_MAPPED):
            prefixes += [_prefix(part, is_mixed) for part in network.address_exclude(_MAPPED)]
        else:
            prefixes.append(_prefix(network, is_mixed))
    return prefixes


def _prefix(network: ipaddress.IPv4Network | ipaddress.IPv6Network, is_mixed: bool) -> tuple[int, bytes]:
    if is_mixed and isinstance(network, ipaddress.IPv4Network):
        return 96 + network.prefixlen, _MAPPED.network_address.packed[:12] + network.network_address.packed
    return network.prefixlen, network.network_address.packed


_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def _comparison(addresses: tuple[str, ...], is_mixed: bool) -> str:
    """C: whether an address, as words in network byte order, is within one of the prefixes; there being none, it is."""
    compared = []
    for network in map(ipaddress.ip_network, addresses):
        within = _within(*_prefix(network, is_mixed))
        if isinstance(network, ipaddress.IPv6Network) and network.supernet_of(_MAPPED):
            within += f" && !{_within(*_prefix(_MAPPED, is_mixed))}"
        compared.append(within)
    return "(" + (" || ".join(f"({each})" for each in compared) or "1") + ")"


def _within(length: int, packed: bytes) -> str:
    bits = 8 * len(packed)
    mask = ((1 << length) - 1 << bits - length).to_bytes(len(packed), "big")
    words = []
    for word in range(len(packed) // 4):
        part, value = (int.from_bytes(whole[4 * word:4 * word + 4], sys.byteorder) for whole in (mask, packed))
        if part:
            words.append(f"(((words)[{word}] ^ {value:#x}) & {part:#x})")
    return f"(!({' | '.join(words)}))" if words else "1"


def digest(config: InterfaceConfig, variant: Variant) -> str:
    """Tells programs apart: the same for what is compiled from the same, and the same contents of its maps."""
    parts = [_request(source(SOURCE), flags(config, variant)), *config.sources, *config.targets]
    if variant.cpus:
        parts += [_request(source(ARRIVAL_SOURCE), []), str(config.spread_queue), *map(str, variant.cpus)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def bcc_version() -> str:
    """Such as "bcc 0.26.0". XdpErmError: there is no bcc, or it does not work."""
    version: str = _clang("{}")["compiler"]
    return version


def source(name: str) -> str:
    """One of the C texts in bpf/, with the project's own headers in it."""
    text = (shared.BPF_DIRECTORY / name).read_text()

    def included(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.end()) + 2
        return f'#line 1 "{match[1]}"\n{source(match[1])}#line {line} "{name}"'
    return _INCLUDE.sub(included, text)


def compiled(text: str, options: list[str]) -> Object:
    """What bcc makes of a C text (see source()), or has made. XdpErmError: it does not compile; clang prints why.

    Needs root, because bcc makes the text's maps for a moment.
    """
    request = _request(text, options)
    found = cache.find(request)
    if found:
        return found
    answer = _clang(request)
    cache.keep(request, answer)
    return Object.of(answer)


def _request(text: str, options: list[str]) -> str:
    """All that the result depends on but for the compiler, as clang.py takes it."""
    # Whatever the running kernel's headers are, they are not needed.
    headers = dict(_files(shared.BPF_DIRECTORY / _HEADERS, _HEADERS))
    return json.dumps({"text": text, "options": options, "headers": headers}, sort_keys=True)


def _files(directory: Any, name: str) -> Iterator[tuple[str, str]]:
    for entry in directory.iterdir():
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            yield from _files(entry, path)
        else:
            yield path, entry.read_text()


def _clang(request: str) -> dict[str, Any]:
    """The answer of clang.py.

    It runs in a process of its own, in which nothing of the caller's environment, directory and paths of modules
    counts, which may run out of memory, and which takes the compiler's 130 MB with it.
    """
    import subprocess  # takes its time, as does what follows
    from importlib import resources
    program = (resources.files("xdp_erm_py.program") / "clang.py").read_text()
    try:
        # Not subprocess.run(), which would kill it at Ctrl-C: it removes what it has put into /run, and ends.
        with subprocess.Popen([sys.executable, "-I", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, cwd="/", env={}) as process:
            output, said = (text.decode(errors="replace") for text in process.communicate(request.encode()))
    except OSError as error:
        raise XdpErmError(f"the compiler cannot be run: {error.strerror}") from None
    if process.returncode:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        raise XdpErmError(": ".join([f"the compiler ended with {how}", *said.splitlines()[-1:]]))
    answer: dict[str, Any] = json.loads(output)
    if "error" in answer:
        print(said, end="", file=sys.stderr)
        raise XdpErmError(answer["error"])
    return answer


def classifier() -> Object:
    """bpf/isolate.c, with the function CLASSIFIER. It is the same in each configuration."""
    return compiled(source(CLASSIFIER_SOURCE), [])


def classifier_digest() -> str:
    """Tells filters apart: the same for what is compiled from the same."""
    return hashlib.sha256(_request(source(CLASSIFIER_SOURCE), []).encode()).hexdigest()[:8]


class Compiled:
    """A compiled program and the maps made for it, which are gone after the with block unless a program holds them.

    `options` go to the C compiler, after the configuration's own. OSError: the kernel makes no such maps.
    """

    def __init__(self, config: InterfaceConfig, variant: Variant = PLAIN, options: tuple[str, ...] = ()) -> None:
        self._config, self._variant = config, variant
        with contextlib.ExitStack() as stack:
            text = source(SOURCE)
            self._program = stack.enter_context(Module(compiled(text, [*flags(config, variant), *options])))
            self.maps = dict(self._program.maps)
            if variant.cpus:
                self._arrival = stack.enter_context(Module(compiled(source(ARRIVAL_SOURCE), [])))
                self.maps |= self._arrival.maps
            fill(self._program, config, variant)
            self._stack = stack.pop_all()

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

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
            arrival = self._arrival.load_xdp(ARRIVAL, frags, cpumap=True, carried=carried)
            try:
                for cpu in self._variant.cpus:
                    bpf.update(self.maps["cpus"], struct.pack("=I", cpu),
                               struct.pack("=Ii", self._config.spread_queue, arrival))
            finally:
                os.close(arrival)
        program = self._program.load_xdp(PROGRAM, frags, carried=carried)
        if self._variant.cpus:
            # Only the other CPUs' program uses it, and it is through this one that it is found.
            bpf.bind_map(program, carried.get("arrived", self.maps["arrived"]))
        return program


def fill(program: Module, config: InterfaceConfig, variant: Variant) -> None:
    """Puts into a program's maps what it only reads: long allow lists, and the CPUs that take part."""
    for name, addresses in (("sources", config.sources), ("targets", config.targets)):
        if _is_long(addresses):
            for length, packed in _prefixes(addresses, _is_mixed(config)):
                # The length in bits, then the address in network byte order.
                bpf.update(program.maps[name], struct.pack("=I", length) + packed, b"\1")
    for lane, cpu in enumerate(variant.cpus):
        bpf.update(program.maps["lanes"], struct.pack("=I", lane), struct.pack("=I", cpu))
