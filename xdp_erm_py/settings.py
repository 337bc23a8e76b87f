"""The settings of an interface: one table, which file, command line, zeekctl's options and documentation follow.

Each is a field of InterfaceConfig: its name, its type and its default, and by setting() all else that there is to say
of it. What the program is compiled with because of it stands in program/compiler.py, by the same name.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterable
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
    prefixes = set()
    for prefix in value if isinstance(value, list) else [value]:
        if not isinstance(prefix, str):
            raise ValueError(f"{prefix!r} is not an IPv4 prefix like 192.0.2.0/24")
        try:
            prefixes.add(ipaddress.IPv4Network(prefix))
        except ValueError as error:
            raise ValueError(f"{prefix!r} is not an IPv4 prefix like 192.0.2.0/24: {error}") from None
    return tuple(str(prefix) for prefix in sorted(prefixes))


def _addresses(value: Any) -> tuple[str, ...]:
    addresses = set()
    for address in value if isinstance(value, list) else [value]:
        try:
            addresses.add(ipaddress.IPv4Address(address if isinstance(address, str) else None))
        except ValueError:
            raise ValueError(f"{address!r} is not an IPv4 address like 192.0.2.7") from None
    return tuple(str(address) for address in sorted(addresses))


class Setting(NamedTuple):
    """One setting, but for its name and default."""

    check: Callable[[Any], Any]
    """Brings a value into canonical form; ValueError says what is wrong with it."""
    option: str
    """Of the command line. A setting that is on or off has one for what is not the default."""
    help: str
    """In a line: on the command line what the option does, and in zeekctl.cfg the same."""
    meaning: str
    """For the documentation, in Markdown."""
    metavar: str | None = None
    """What the option's value is called; None: it has none, the setting is on or off."""
    many: bool = False
    """Whether it has several values: commas on the command line, where it may also be repeated."""
    number: bool = False
    unset: str | None = None
    """What an empty value amounts to."""


def setting(default: Any, *arguments: Any, **keywords: Any) -> Any:
    """A field of InterfaceConfig; what follows the default is that of Setting."""
    return dataclasses.field(default=default, metadata={"setting": Setting(*arguments, **keywords)})


@dataclasses.dataclass(frozen=True)
class InterfaceConfig:
    """How one interface is treated. Values are checked and in canonical form."""

    port: tuple[int, ...] = setting(
        (shared.ERM_DEFAULT_PORT,), _ports, "--port", "UDP destination ports that carry ERM",
        "UDP destination port, or several", "PORT[,PORT]", many=True, number=True)
    vlan: str = setting(
        "restore", _one_of(tuple(shared.VLAN_MODES)), "--vlan", "the mirrored frame's 802.1Q tag",
        "`restore`: insert the VLAN of the ERM header as an 802.1Q tag, always, so that both directions of a flow look "
        "alike (switches are known to mark one direction as untagged); `tagged`: only if the header says tagged; "
        "`strip`: never. VLAN 0 inserts nothing", "{restore,tagged,strip}")
    depth: int = setting(
        1, _depth, "--depth", f"levels of ERM to peel, 1 to {shared.MAX_DEPTH}; more than 1 needs --source",
        f"levels of ERM to peel, 1 to {shared.MAX_DEPTH}. More than 1 needs `sources`, since every mirrored host can "
        "send ERM, too: a level within is peeled where its own source is one of them", "LEVELS", number=True)
    mode: str = setting(
        "auto", _one_of(MODES), "--mode", "where XDP runs",
        "`native` (in the driver), `generic` (in the stack, slower, every driver), `auto`: native, else generic",
        "{auto,native,generic}")
    sources: tuple[str, ...] = setting(
        (), _prefixes, "--source", "take ERM only from these IPv4 prefixes",
        "IPv4 prefixes of the switches; ERM from elsewhere is passed untouched and counted, by sender as well. Set it",
        "PREFIX[,PREFIX]", many=True, unset="any")
    targets: tuple[str, ...] = setting(
        (), _addresses, "--target", "take ERM only to these IPv4 addresses",
        "IPv4 addresses that the switches send to, likewise. Set it", "ADDRESS[,ADDRESS]", many=True, unset="any")
    sessions: bool = setting(
        True, _flag, "--no-sessions", "do not count by switch session",
        f"count by switch session (source address and port): {shared.OWN_SESSIONS} of each CPU and "
        f"{shared.MAX_SESSIONS:,} more, idle ones replaced first")
    set_mtu: bool = setting(
        False, _flag, "--set-mtu", "raise an MTU that is too small for full-size mirrored frames",
        "raise an MTU below 1554, which a full-size mirrored frame needs")
    isolate: bool = setting(
        True, _flag, "--no-isolate", "let the host's own network stack have the decapsulated frames, too",
        "decapsulated frames are for packet taps (Zeek, tcpdump) only, see below")
    spread: str = setting(
        "none", _one_of(SPREADS), "--spread", "spread decapsulated frames over CPUs",
        "over which CPUs decapsulated frames go on: `none`, `auto`, `cpumap` or `rps`, see Spread",
        "{none,auto,rps,cpumap}")
    spread_cpus: tuple[int, ...] = setting(
        (), _cpus, "--spread-cpus", "over these CPUs", "these CPUs, like `2-5,8`", "CPU[,CPU-CPU]", many=True,
        unset="found out")
    spread_avoid: tuple[int, ...] = setting(
        (), _cpus, "--spread-avoid", "over all CPUs but these and those of the NIC's interrupts",
        "CPUs to leave out where `spread_cpus` is not set", "CPU[,CPU-CPU]", many=True, unset="none")
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
