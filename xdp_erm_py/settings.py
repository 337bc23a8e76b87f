"""The settings of an interface: one table, which file, command line, zeekctl's options and documentation follow.

Each is a field of InterfaceConfig: its name, its type and its default, and by setting() all else that there is to say
of it. What the program is compiled with because of it stands in program/compiler.py, by the same name.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple

from . import shared

MODES = ("auto", "native", "generic")
SPREADS = ("none", "auto", "rps", "cpumap")
LONGEST_QUEUE = 16384  # what the kernel allows a cpumap's queue, in frames


def _ports(value: Any) -> tuple[int, ...]:
    ports = value if isinstance(value, list) else [value]
    for port in ports:
        if type(port) is not int or not 1 <= port <= 65535:
            raise ValueError(f"{port!r} is not a UDP port (1 to 65535)")
    if not ports:
        raise ValueError("no port given")
    return tuple(sorted(set(ports)))


def _depth(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= shared.MAX_DEPTH:
        raise ValueError(f"{value!r} is not a depth (1 to {shared.MAX_DEPTH})")
    return value


def _queue(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LONGEST_QUEUE:
        raise ValueError(f"{value!r} is not a number of frames (1 to {LONGEST_QUEUE})")
    return value


def _cpus(value: Any) -> tuple[int, ...]:
    cpus: set[int] = set()
    for item in value if isinstance(value, list) else [value]:
        if type(item) is int and item >= 0:
            cpus.add(item)
        elif isinstance(item, str):
            cpus.update(parse_cpu_list(item))
        else:
            raise ValueError(f"{item!r} is not a CPU's number, nor a list like 2-5,8")
    return tuple(sorted(cpus))


def parse_cpu_list(text: str) -> list[int]:
    """The numbers in a list of CPUs as the kernel writes it, like 2-5,8. ValueError: it is none."""
    cpus: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        numbers = [first, last] if dash else [first]
        if not all(number.isascii() and number.isdecimal() and len(number) < 6 for number in numbers):
            raise ValueError(f"{text!r} is not a list of CPUs like 2-5,8")
        if int(numbers[0]) > int(numbers[-1]):
            raise ValueError(f"{part!r} in {text!r} runs backwards")
        cpus += range(int(numbers[0]), int(numbers[-1]) + 1)
    return cpus


def cpu_list(cpus: Iterable[int]) -> str:
    """Rising numbers as parse_cpu_list reads them."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1][1:] = [cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return str(value)
    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _prefixes(value: Any) -> tuple[str, ...]:
    prefixes: set[Any] = set()
    for prefix in value if isinstance(value, list) else [value]:
        if not isinstance(prefix, str):
            raise ValueError(f"{prefix!r} is not a prefix like 192.0.2.0/24 or 2001:db8::/32")
        try:
            network = (ipaddress.IPv6Network if ":" in prefix else ipaddress.IPv4Network)(prefix)
        except ValueError as error:
            raise ValueError(f"{prefix!r} is not a prefix like 192.0.2.0/24 or 2001:db8::/32: {error}") from None
        _refuse_mapped(prefix, network.network_address)
        prefixes.add(network)
    return tuple(str(prefix) for prefix in sorted(prefixes, key=ipaddress.get_mixed_type_key))


def _addresses(value: Any) -> tuple[str, ...]:
    addresses: set[Any] = set()
    for text in value if isinstance(value, list) else [value]:
        try:
            address = ipaddress.ip_address(text if isinstance(text, str) else "")
        except ValueError:
            raise ValueError(f"{text!r} is not an address like 192.0.2.7 or 2001:db8::7") from None
        _refuse_mapped(text, address)
        addresses.add(address)
    return tuple(str(address) for address in sorted(addresses, key=ipaddress.get_mixed_type_key))


def _refuse_mapped(text: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    """The program knows IPv4 addresses by this form of IPv6, and no interfaces that go with an address."""
    if getattr(address, "ipv4_mapped", None) or getattr(address, "scope_id", None):
        raise ValueError(f"{text!r}: write an IPv4 address as such, and an IPv6 address without an interface")


def _encapsulations(value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in shared.ENCAPSULATIONS:
            raise ValueError(f"{name!r} is none of {', '.join(shared.ENCAPSULATIONS)}")
    if not names:
        raise ValueError("no encapsulation given")
    return tuple(name for name in shared.ENCAPSULATIONS if name in names)


class Setting(NamedTuple):
    """One setting, but for its name and default."""

    check: Callable[[Any], Any]
    """Brings a value into canonical form; ValueError says what is wrong with it."""
    option: str
    """Of the command line. A setting that is on or off has one for what is not the default."""
    help: str
    """In a line: what the option does, on the command line as in zeekctl.cfg."""
    meaning: str
    """For the documentation, in Markdown."""
    metavar: str | None = None
    """What the option's value is called; None: it has none, the setting is on or off."""
    many: bool = False
    """Whether it has several values: commas on the command line, where it may also be repeated."""
    number: bool = False
    unset: str | None = None
    """What an empty value amounts to."""
    zeekctl: bool = True
    """Whether zeekctl.cfg and node.cfg have it as well."""


def setting(default: Any, *arguments: Any, **keywords: Any) -> Any:
    """A field of InterfaceConfig; what follows the default is that of Setting."""
    return dataclasses.field(default=default, metadata={"setting": Setting(*arguments, **keywords)})


@dataclasses.dataclass(frozen=True)
class InterfaceConfig:
    """How one interface is treated. Values are checked and in canonical form."""

    encapsulations: tuple[str, ...] = setting(
        ("erm",), _encapsulations, "--encapsulation",
        f"in which mirrored frames come: {', '.join(shared.ENCAPSULATIONS)}",
        "in which mirrored frames come, one or several of " +
        ", ".join(f"`{name}`" for name in shared.ENCAPSULATIONS), "NAME[,NAME]", many=True)
    port: tuple[int, ...] = setting(
        (shared.ERM_DEFAULT_PORT,), _ports, "--port", "UDP destination ports that carry ERM",
        "UDP destination port of ERM, or several", "PORT[,PORT]", many=True, number=True)
    vxlan_port: tuple[int, ...] = setting(
        (shared.VXLAN_DEFAULT_PORT,), _ports, "--vxlan-port", "UDP destination ports that carry VXLAN",
        "likewise of VXLAN", "PORT[,PORT]", many=True, number=True)
    geneve_port: tuple[int, ...] = setting(
        (shared.GENEVE_DEFAULT_PORT,), _ports, "--geneve-port", "UDP destination ports that carry GENEVE",
        "likewise of GENEVE", "PORT[,PORT]", many=True, number=True)
    tzsp_port: tuple[int, ...] = setting(
        (shared.TZSP_DEFAULT_PORT,), _ports, "--tzsp-port", "UDP destination ports that carry TZSP",
        "likewise of TZSP", "PORT[,PORT]", many=True, number=True)
    vlan: str = setting(
        "restore", _one_of(tuple(shared.VLAN_MODES)), "--vlan", "the mirrored frame's 802.1Q tag",
        "`restore`: insert the VLAN that is in the header only (ERM, ERSPAN II and III) as an 802.1Q tag, always, so "
        "that both directions of a flow look alike (switches are known to mark one direction as untagged); `tagged`: "
        "only if the header says tagged; `strip`: never. VLAN 0 inserts nothing", "{restore,tagged,strip}")
    depth: int = setting(
        1, _depth, "--depth", f"levels of wrapping to peel, 1 to {shared.MAX_DEPTH}; more than 1 needs sources",
        f"levels of wrapping to peel, 1 to {shared.MAX_DEPTH}. More than 1 needs `sources`, since every mirrored host "
        "can send the like: a level within is peeled where its own source is one of them", "LEVELS", number=True)
    mode: str = setting(
        "auto", _one_of(MODES), "--mode", "where XDP runs",
        "`native` (in the driver), `generic` (in the stack, slower, every driver), `auto`: native, else generic",
        "{auto,native,generic}")
    sources: tuple[str, ...] = setting(
        (), _prefixes, "--source", "take mirrored frames only from these prefixes",
        "prefixes of the switches, IPv4 and, but for ERM and TZSP, IPv6; what comes from elsewhere is passed untouched "
        "and counted, by sender as well. Set it",
        "PREFIX[,PREFIX]", many=True, unset="any")
    targets: tuple[str, ...] = setting(
        (), _addresses, "--target", "take mirrored frames only to these addresses",
        "addresses that the switches send to, likewise. Set it", "ADDRESS[,ADDRESS]", many=True, unset="any")
    sessions: bool = setting(
        True, _flag, "--no-sessions", "do not count by switch session",
        f"count by mirror session: {shared.OWN_SESSIONS} of each CPU and "
        f"{shared.MAX_SESSIONS:,} more, idle ones replaced first")
    set_mtu: bool = setting(
        False, _flag, "--set-mtu", "raise an MTU that is too small for full-size mirrored frames",
        "raise an MTU that a full-size mirrored frame does not fit, 1554 for ERM")
    isolate: bool = setting(
        True, _flag, "--no-isolate", "let the host's own network stack have the decapsulated frames, too",
        "decapsulated frames are for packet taps (Zeek, tcpdump) only, see [Isolation](operate.md#isolation)")
    spread: str = setting(
        "none", _one_of(SPREADS), "--spread", "spread decapsulated frames over CPUs",
        "over which CPUs decapsulated frames go on: `none`, `auto`, `cpumap` or `rps`, see [Spread](operate.md#spread)",
        "{none,auto,rps,cpumap}")
    spread_cpus: tuple[int, ...] = setting(
        (), _cpus, "--spread-cpus", "over these CPUs", "these CPUs, like `2-5,8`", "CPU[,CPU-CPU]", many=True,
        unset="found out")
    spread_avoid: tuple[int, ...] = setting(
        (), _cpus, "--spread-avoid", "over all CPUs but these and those of the NIC's interrupts",
        "CPUs to leave out where `spread_cpus` is not set", "CPU[,CPU-CPU]", many=True, unset="none",
        zeekctl=False)  # its plugin leaves out those that node.cfg pins Zeek to
    spread_queue: int = setting(
        2048, _queue, "--spread-queue", "frames that wait for a CPU at most (cpumap)",
        f"frames that wait for a CPU at most (`cpumap`), 1 to {LONGEST_QUEUE}", "FRAMES", number=True)
    spread_ports: bool = setting(
        False, _flag, "--spread-ports",
        "let the flows of one pair of addresses go to different CPUs (cpumap)",
        "flows of one pair of addresses may go to different CPUs (`cpumap`); fragments then go by the addresses alone")

    def as_dict(self) -> dict[str, Any]:
        """The same as plain lists, strings and numbers, as in YAML and JSON."""
        return {key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(self).items()}


#: Encapsulations that come in IPv4 only; their sessions are told apart by the UDP source port.
IPV4_ONLY = {"erm", "tzsp"}
#: Those that come over UDP, with the setting of their ports.
PORTS = {"erm": "port", "vxlan": "vxlan_port", "geneve": "geneve_port", "tzsp": "tzsp_port"}


def contradictions(config: InterfaceConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """The settings that do not go together, of which at least one was made, and why."""
    if config.depth > 1 and not config.sources:
        yield ("depth",), (f"{config.depth} needs `sources`, the switches' addresses (--source): every mirrored host "
                           "can send the like, and would put frames of its own before Zeek")
    if IPV4_ONLY.issuperset(config.encapsulations):
        for name in ("sources", "targets"):
            for address in getattr(config, name):
                if ":" in address:
                    yield (name,), (f"{address!r} is IPv6, in which {' and '.join(config.encapsulations)} "
                                    f"{'does' if len(config.encapsulations) == 1 else 'do'} not come")
    taken: dict[int, str] = {}
    for encapsulation in config.encapsulations:
        for port in getattr(config, PORTS[encapsulation]) if encapsulation in PORTS else ():
            if port in taken:
                yield (PORTS[encapsulation], PORTS[taken[port]]), \
                    f"{port} is a port of both {taken[port]} and {encapsulation}"
            taken[port] = encapsulation


#: By name.
SETTINGS: dict[str, Setting] = {field.name: field.metadata["setting"] for field in dataclasses.fields(InterfaceConfig)}
DEFAULTS = InterfaceConfig().as_dict()


def check(name: str, value: Any) -> Any:
    """The canonical form of one setting; ValueError says what is wrong with it."""
    if name not in SETTINGS:
        raise ValueError(f"unknown key {name!r} (known: {', '.join(SETTINGS)})")
    return SETTINGS[name].check(value)


def reference() -> str:
    """The table of all settings for the documentation, in Markdown."""
    rows = ["| key | option | default | meaning |", "|---|---|---|---|"]
    for name, each in SETTINGS.items():
        value = DEFAULTS[name]
        if isinstance(value, bool):
            shown = "on" if value else "off"
        elif isinstance(value, list):
            shown = ", ".join(map(str, value)) or str(each.unset)
        else:
            shown = f"`{value}`" if isinstance(value, str) else str(value)
        rows.append(f"| `{name}` | `{each.option}` | {shown} | {each.meaning} |")
    return "\n".join(rows) + "\n"
