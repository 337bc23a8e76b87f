"""`xdp-erm doctor`: looks at everything that decapsulation depends on, and says what to do now. It changes nothing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import config, shared, systemd
from .errors import XdpErmError
from .interface import isolation, loader, nic, ours, programs, running, stats, topology
from .interface.ours import Attachment
from .kernel import privileges, version
from .kernel.links import Link, Links
from .modules import PACKAGES
from .printable import printable, say
from .program import compiler, encapsulations
from .program.counters import COUNTERS
from .publish import lock
from .publish.publisher import KEEP_SECONDS
from .publish.reports import seconds
from .settings import DEFAULTS, PORTS

OK, WARNING, PROBLEM = "ok", "warning", "problem"

LEAST_KERNEL = (5, 10)

# Mirrored traffic pauses, but hardly so long; the same as XDP_ERM::session_silence.
SILENCE = 300  # seconds

# A publisher that reaches Zeek has brought it a report by then, unless its interval is a long one.
FIRST_REPORT = 60  # seconds

# How long a program is looked at that seems to see no frames; drivers count some of them once in two seconds.
PATIENCE = 2.5  # seconds

ETH_P_ALL = 0x0003  # as in linux/if_ether.h

# As a share of what came: more of it is worth a word.
LOST = 0.001

# As a share of the frames handed to other CPUs: more of them is worth a word.
QUEUE_DROPS = 0.01


class Result(NamedTuple):
    """What a check has found."""

    result: str
    """OK, WARNING or PROBLEM."""
    text: str
    """What is so, and what to do now."""


class Finding(NamedTuple):
    """A result as it is shown."""

    interface: str | None
    """None: the whole host."""
    check: str
    result: str
    text: str


class Patient(NamedTuple):
    """An interface, and what is known of it."""

    link: Link
    settings: dict[str, Any]
    """Those of the attached program, else those configured."""
    attached: Attachment | None
    """Our program; None also where we may not know."""
    counted: dict[str, Any]
    """As in stats.snapshot(); empty where our program is not attached."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("interfaces", nargs="*", metavar="IFACE",
                        help="default: those in the configuration file, and all it is attached to")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_PATH}, if it is there")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Exit status 1: there is a problem. UsageError: no interface has such a name."""
    findings = list(examine(config.check_interface_names(args.interfaces), args.config))
    if args.json:
        print(json.dumps({"checks": [finding._asdict() for finding in findings]}))
    else:
        for finding in findings:
            say(f"{finding.result:<7}  {finding.interface or 'host'}: {finding.text}")
    return int(any(finding.result == PROBLEM for finding in findings))


def examine(names: list[str], file: Path | None = None) -> Iterator[Finding]:
    """All checks, of the host and of each interface. `names` and `file` are those of the command line."""
    for check in HOST_CHECKS:
        yield from _findings(None, check)
    configuration = config.Configuration()
    try:
        configuration = config.load(file)
    except XdpErmError as error:
        yield Finding(None, "configuration", PROBLEM, str(error))
    known = _may_look()
    with Links() as links:
        if not names:
            running = [found.link.name for found in ours.find_all(links)] if known else []
            names = [*configuration.interfaces, *running, *(worker.interface for worker in _zeeks_units())]
        if not names:
            yield Finding(None, "interfaces", PROBLEM, "no interface: name one, or put it under `interfaces` in "
                                                       f"{file or config.DEFAULT_PATH}")
        examined = set()
        for name in dict.fromkeys(names):
            try:
                link = links.find(name)
                if link.index in examined:
                    continue  # under another name
                examined.add(link.index)
                patient = _patient(link, configuration, known)
            except (OSError, XdpErmError) as error:
                yield Finding(name, "interface", PROBLEM, _without(name, error))
                continue
            checks = LINK_CHECKS + (program,) * known + PROGRAM_CHECKS * (patient.attached is not None)
            for each in checks:
                yield from _findings(patient, each)


def _zeeks_units() -> list[systemd.Worker]:
    """Those of Zeek's own workers, which are made of its zeek.conf."""
    try:
        return systemd.zeek_workers()
    except XdpErmError:  # systemctl does not answer here, as in a container
        return []


def _patient(link: Link, configuration: config.Configuration, known: bool) -> Patient:
    found = ours.attachment_of(link) if known else None
    if found is None:
        return Patient(link, configuration.of(link.names, {}).as_dict(), None, {})
    settings = {**DEFAULTS, **found.state["config"]}
    return Patient(link, settings, found, stats.read(found))


def _findings(patient: Patient | None, check: Callable[..., Iterator[Result]]) -> Iterator[Finding]:
    name = patient.link.name if patient else None
    try:
        for result in check(patient) if patient else check():
            yield Finding(name, check.__name__, *result)
    except (OSError, ModuleNotFoundError, XdpErmError) as error:
        yield Finding(name, check.__name__, PROBLEM, _without(name, error))


def _without(name: str | None, error: Exception) -> str:
    """The text of an error without the interface that it begins with."""
    return str(error)[len(f"{name}: "):] if str(error).startswith(f"{name}: ") else str(error)


def _may_look() -> bool:
    try:
        privileges.require_to_look()
    except XdpErmError:
        return False
    return True


# The host

def kernel() -> Iterator[Result]:
    if version.running() < LEAST_KERNEL:
        yield Result(PROBLEM, f"Linux {platform.release()}: xdp-erm needs {'.'.join(map(str, LEAST_KERNEL))} or newer")
    else:
        yield Result(OK, f"Linux {platform.release()}")


def rights() -> Iterator[Result]:
    try:
        privileges.require_to_change()
    except XdpErmError as error:
        yield Result(PROBLEM, f"{error}; what needs it is not looked at")
        return
    refused = programs.bpf_refused()
    yield Result(PROBLEM, refused) if refused else Result(OK, "BPF can be used")


def modules() -> Iterator[Result]:
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            yield Result(PROBLEM, f"the Python module {name} is missing: install {package}")
    yield Result(OK, compiler.bcc_version())  # last, as it ends this where there is no bcc


def publisher() -> Iterator[Result]:
    if lock.holder(lock.DEFAULT) is not None:
        yield Result(OK, lock.describe(lock.DEFAULT))
    else:
        yield Result(WARNING, "no publisher runs, so Zeek gets no counters: `zeekctl start` starts one, or `systemctl "
                              f"start {systemd.PUBLISHER}`")


def fanout() -> Iterator[Result]:
    groups: dict[str | None, set[str]] = {}
    for worker in _zeeks_units():
        groups.setdefault(worker.fanout_id, set()).add(worker.interface)
    for number, names in groups.items():
        if number and len(names) > 1:
            yield Result(WARNING, f"Zeek's workers of {', '.join(sorted(names))} have one AF_PACKET fanout id "
                                  f"({number}), so that those of one interface start and the others do not: unless a "
                                  "script does, give each a section in zeek.conf with an id of its own "
                                  "(`worker_args = AF_Packet::fanout_id=NUMBER`)")


# An interface

def interface(patient: Patient) -> Iterator[Result]:
    if not patient.link.up:
        yield Result(PROBLEM, f"it is down: `ip link set dev {patient.link.name} up`")
    elif not patient.link.carrier:
        yield Result(PROBLEM, "it has no carrier: is the cable in, and the other end up?")
    else:
        yield Result(OK, "it is up")


def place(patient: Patient) -> Iterator[Result]:
    try:
        topology.check(patient.link)
    except XdpErmError as error:
        yield Result(PROBLEM, _without(patient.link.name, error))
        return
    with Links() as links:
        for line in topology.diverted(links, patient.link, patient.settings["encapsulations"],
                                      patient.settings["sources"]):
            yield Result(WARNING, line)
        if patient.settings["isolate"]:
            for line in topology.starved(links, patient.link):
                yield Result(WARNING, line)
        if patient.link.mode == "generic":
            for line in topology.untagged(links, patient.link):
                yield Result(WARNING, line)


def address(patient: Patient) -> Iterator[Result]:
    with Links() as links:
        # A bridge or a bond has those of its parts, which get other frames than mirrored ones still.
        holders = {link: found for link in (patient.link, *topology.above(links, patient.link))
                   for found in [links.addresses(link)] if found}
    addresses = [each for found in holders.values() for each in found]
    if not addresses:
        yield Result(WARNING, "it has no address: a switch suspends a mirror session when nobody answers its ARP "
                              "requests, so give the interface the address that the session names")
    for link, found in holders.items():
        obstacle = _no_arp(link)
        told = f"{'it' if link == patient.link else link.name} has the address {', '.join(found)}"
        yield Result(WARNING, f"{told}, but {obstacle}; a switch suspends a mirror session when nobody answers its ARP "
                              "requests") if obstacle else Result(OK, told)
    targets = patient.settings["targets"]
    if targets and addresses and not set(targets) & set(addresses):
        yield Result(WARNING, f"none of its addresses is in `targets` ({', '.join(targets)}), so what is sent to them "
                              "is not taken: add the one that the mirror sessions name")


def _no_arp(link: Link) -> str | None:
    """Why nobody answers ARP requests for its addresses; None: the host does."""
    if not link.answers_arp:
        return f"ARP is off on it: `ip link set dev {link.name} arp on`"
    for where in (link.name, "all"):
        ignored = f"net/ipv4/conf/{where}/arp_ignore"  # IPv6's neighbour discovery has no such thing
        if _sysctl(ignored) == "8":  # below that the interface's own addresses are answered for
            return f"the host answers no ARP requests: `sysctl -w {ignored}=0`"
    return None


def _sysctl(name: str) -> str | None:
    """The kernel's setting, in this network namespace; None: it has none."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return None


def _needed(patient: Patient) -> tuple[int, list[Link]]:
    """The MTU for full-size mirrored frames, and the interfaces that need it: this one and those below it."""
    with Links() as links:
        stack = topology.stack(links, patient.link)
    return encapsulations.least_mtu(patient.settings["encapsulations"],
                                    patient.settings["sources"] + patient.settings["targets"]), stack


def mtu(patient: Patient) -> Iterator[Result]:
    least, stack = _needed(patient)
    outdated = patient.attached.outdated if patient.attached else None
    if outdated:
        yield Result(WARNING, f"{outdated} since xdp-erm was attached, after which some drivers do not run the "
                              f"program: `xdp-erm attach {patient.link.name}`")
    small = [link for link in stack if link.mtu < least]
    for link in small:
        here = "" if link == patient.link else f" of {link.name}, whose frames it gets,"
        yield Result(WARNING, f"MTU{here} is {link.mtu}, and full-size mirrored frames need {least}: `xdp-erm attach "
                              f"--set-mtu {patient.link.name}`, or `ip link set dev {link.name} mtu {least}`")
    if not small and not outdated:
        yield Result(OK, f"MTU is {patient.link.mtu}")


def buffers(patient: Patient) -> Iterator[Result]:
    least, stack = _needed(patient)
    for link in stack:
        for line in nic.short_buffers(link, least):
            yield Result(PROBLEM, line if link == patient.link else f"{link.name}: {line}")


def allow_lists(patient: Patient) -> Iterator[Result]:
    taken = patient.settings["encapsulations"]
    ports = [str(port) for name in taken if name in PORTS for port in patient.settings[PORTS[name]]]
    sent = [f"UDP to port {', '.join(ports)}"] * bool(ports) + ["GRE"] * any(name not in PORTS for name in taken)
    for key, what in (("sources", "the switches' addresses"), ("targets", "the address that the mirror sessions name")):
        if patient.settings[key]:
            yield Result(OK, f"`{key}` is {', '.join(patient.settings[key])}")
        else:
            yield Result(WARNING, f"`{key}` is not set, so whoever can send {' or '.join(sent)} can put frames before "
                                  f"Zeek: set it to {what}")


def program(patient: Patient) -> Iterator[Result]:
    link, attached = patient.link, patient.attached
    if attached:
        yield Result(OK, f"xdp-erm is attached ({attached.mode}, program {attached.program_id}, since "
                         f"{attached.state['attached_at']})")
    elif link.program_id is not None:
        raise loader.other_program(link)
    elif _starts_at_boot(link.name):
        yield Result(PROBLEM, "xdp-erm is not attached although a systemd unit shall do it: `xdp-erm attach "
                              f"{link.name}` attaches, `systemctl status 'xdp-erm@*'` says what went wrong")
    else:
        yield Result(PROBLEM, f"xdp-erm is not attached: `xdp-erm attach {link.name}`")


def _starts_at_boot(name: str) -> bool:
    """Whether systemd attaches; in a unit's name - stands for / and other characters as \\xNN."""
    units = (systemd.UNIT_DIRECTORY / "multi-user.target.wants").glob("xdp-erm@*.service")
    instances = (unit.name[len("xdp-erm@"):-len(".service")] for unit in units)
    return name in (re.sub(r"\\x([0-9a-f]{2})", lambda code: chr(int(code[1], 16)), each) for each in instances)


# Our program

def mode(patient: Patient) -> Iterator[Result]:
    assert patient.attached is not None
    if patient.attached.mode == "generic" and patient.settings["mode"] != "generic":
        reason = patient.attached.state.get("why_generic") or (
            f"it was so before, which `mode: auto` leaves as it is: `xdp-erm attach --mode native {patient.link.name}` "
            "changes it")
        yield Result(WARNING, f"generic mode, which is slower: {reason}")
    elif stats.scattered(patient.attached):
        yield Result(PROBLEM, f"native mode, in which {stats.scattered(patient.attached)} frames have their headers in "
                              f"several pieces of memory and stayed wrapped: `xdp-erm attach {patient.link.name}` "
                              "changes to generic mode")
    elif stats.unmarked(patient.attached):
        yield Result(PROBLEM, f"native mode, in which {stats.unmarked(patient.attached)} frames could not be marked "
                              f"for isolation and stayed wrapped: `xdp-erm attach {patient.link.name}` changes to "
                              "generic mode")
    else:
        yield Result(OK, f"{patient.attached.mode} mode")


def run_by_driver(patient: Patient) -> Iterator[Result]:
    assert patient.attached is not None
    with Links() as links:
        came = running.since(links, patient.attached)
        missed = running.unseen(links, patient.attached, PATIENCE)
    if missed:
        yield Result(PROBLEM, running.told(patient.attached, missed))
    elif came and came.seen:
        yield Result(OK, "the program sees what comes")
    elif came and came.received >= running.SUSPECTED:
        yield Result(WARNING, f"the program has seen none of {came.received} packets that came since it was attached, "
                              "and none comes now: look again while some do")


def losses(patient: Patient) -> Iterator[Result]:
    assert patient.attached is not None
    with Links() as links:
        came = running.since(links, patient.attached)
    if came is None:
        return
    lost = {name: frames for name, frames in came.lost.items() if frames > LOST * (came.received + frames)}
    for name, cure in running.LOSSES.items():
        if name in lost:
            yield Result(WARNING, f"{lost[name]} frames were lost before any program, since it was attached ({name}): "
                                  f"{cure}")
    if "rx_errors" in lost and len(lost) == 1:
        yield Result(WARNING, f"{lost['rx_errors']} frames were lost before any program, since it was attached "
                              f"(rx_errors): `ethtool -S {patient.link.name}` says why")


#: What to do about a VLAN tag that comes beside the wrapped frame.
OUTER_TAGGED = ("of a bridge or bond, attach to the part that they come in on, and capture from there; of a veth, turn "
                "off `txvlan` of its other end (`ethtool -K END txvlan off`)")


def isolated(patient: Patient) -> Iterator[Result]:
    assert patient.attached is not None
    if not patient.settings["isolate"]:
        yield Result(WARNING, "`isolate` is off, so the host takes mirrored frames for its own: turn it on, unless "
                              "that is wanted")
        return
    found = isolation.look(patient.link)
    leaked = stats.leaked(patient.attached)
    decapsulated = patient.counted["counters"]["decapsulated"]["packets"]
    if found.by is None:
        yield Result(PROBLEM, "the filter that keeps mirrored frames from the host is gone: `xdp-erm attach "
                              f"{patient.link.name}` puts it back")
    elif found.before:
        yield Result(WARNING, f"{', '.join(found.before)} sees mirrored frames before our filter ({found.by}) and can "
                              f"hand them to the host: `xdp-erm attach {patient.link.name}` puts ours first again, "
                              "where that can be; else remove the other, or let it skip what bears XDP metadata")
    elif not leaked:
        yield Result(OK, f"mirrored frames are kept from the host's own network stack ({found.by})")
    if leaked:
        yield Result(PROBLEM, f"at least {leaked} of {decapsulated} mirrored frames have reached the host's own "
                              f"network stack: {_leak(patient, found)}")
    outer_tagged = patient.counted["isolation"]["outer_tagged"] if patient.counted["isolation"] else 0
    if outer_tagged:
        yield Result(PROBLEM, f"{outer_tagged} mirrored frames have reached Zeek with the VLAN tag of their wrapping, "
                              f"which came beside the frame, where XDP cannot see it: {OUTER_TAGGED}")


def _leak(patient: Patient, found: isolation.Isolation) -> str:
    """What to do about frames that have reached the host."""
    name = patient.link.name
    if found.by is None or found.before:
        return f"`xdp-erm attach {name}` ends it, where that can be"
    assert patient.attached is not None
    if patient.attached.mode == "native":
        return f"the driver loses the mark of frames in native mode: `xdp-erm attach --mode generic {name}`"
    return "use the interface for nothing but capturing until it is known why"


def offloads(patient: Patient) -> Iterator[Result]:
    with Links() as links:
        stack = topology.stack(links, patient.link)
    well = True
    for link in stack:
        here = "" if link == patient.link else f" on {link.name}, whose frames it gets"
        movable, fixed = nic.harmful(link)
        for name in movable:
            yield Result(PROBLEM, f"{name} is on{here}; it {nic.FEATURES[name]}: `xdp-erm attach {patient.link.name}` "
                                  "turns it off")
        for name in fixed:
            if name in nic.TOLERATED:
                yield Result(OK, f"{name} is on{here} and the driver does not let it be turned off, which does no harm "
                                 "unless Zeek's AF_Packet::checksum_validation_mode is CHECKSUM_KERNEL")
            else:
                yield Result(WARNING, f"{name} is on{here} and the driver does not let it be turned off; it "
                                      f"{nic.FEATURES[name]}")
        well = well and not movable and not fixed
    if well:
        yield Result(OK, "no offload changes mirrored frames")


def packets(patient: Patient) -> Iterator[Result]:
    counted = {verdict: patient.counted["counters"][verdict]["packets"] for verdict in shared.VERDICTS}
    total, decapsulated = sum(counted.values()), counted["decapsulated"]
    mirrored = total - counted["other"] - counted["extension"]
    if decapsulated:
        yield Result(OK, f"{decapsulated} packets were decapsulated since {patient.counted['attached_at']}")
        yield from _silence(patient)
    elif not total and _received(patient):
        pass  # run_by_driver() has said what is so
    elif not total:
        yield Result(WARNING, "no packet has come: is the mirror session on, and its target this interface?")
    elif not mirrored:
        yield Result(WARNING, f"none of {total} packets is a mirror's: `tcpdump -ni {patient.link.name}` shows whether "
                              "the switch sends, in what, and to which port; that goes into `encapsulations` "
                              f"({', '.join(patient.settings['encapsulations'])}) and the setting of its port")
    for counter in COUNTERS:
        found, of = patient.counted["counters"][counter.name]["packets"], decapsulated if counter.is_note else mirrored
        if not counter.cure or found <= counter.tolerated * of:
            continue
        if counter.is_note:
            yield Result(WARNING, f"{found} of {of} mirrored frames are {counter.name}: {counter.cure}")
        elif counter.name == "extension":
            yield Result(WARNING, f"{found} packets may be a mirror's and are not decapsulated ({counter.name}): "
                                  f"{counter.cure}")
        else:
            senders = _senders(patient) if counter.name.startswith("foreign") else ""
            yield Result(WARNING if decapsulated else PROBLEM,
                         f"{found} of {of} mirror packets are not decapsulated ({counter.name}): "
                         f"{counter.cure}{senders}")


def _received(patient: Patient) -> bool:
    """Whether so much came to the interface that a program had seen some of it."""
    with Links() as links:
        came = running.since(links, patient.attached) if patient.attached else None
    return came is not None and came.received >= running.SUSPECTED


def _senders(patient: Patient) -> str:
    most = patient.counted["foreign"][:3]
    return f" (most: {', '.join(sender['source'] for sender in most)})" if most else ""


def _silence(patient: Patient) -> Iterator[Result]:
    latest = max((seconds(session["last_seen"]) for session in patient.counted["sessions"]), default=None)
    if latest is not None and time.time() - latest > SILENCE:
        yield Result(WARNING, f"no mirrored packet for {_duration(time.time() - latest)}: the switch suspends its "
                              "session when nobody answers its ARP requests; see there")


def queues(patient: Patient) -> Iterator[Result]:
    cpus = patient.counted["cpus"].values()
    steered, dropped = (sum(cpu[key] for cpu in cpus) for key in ("steered", "dropped"))
    if dropped > QUEUE_DROPS * steered:
        yield Result(WARNING, f"{dropped} of {steered} packets found another CPU's queue full: more `spread_cpus`, "
                              "`spread_ports`, or a longer `spread_queue`")


def captured(patient: Patient) -> Iterator[Result]:
    """Whether there are sockets of AF_PACKET for all protocols, as of Zeek's workers, on it or on all interfaces."""
    number = 0
    for line in Path("/proc/thread-self/net/packet").read_text().splitlines()[1:]:
        _, _, _, protocol, index, bound, *_ = line.split()
        number += int(protocol, 16) == ETH_P_ALL and int(index) in (0, patient.link.index) and bound == "1"
    if number:
        yield Result(OK, f"sockets that capture from it: {number}")
    else:
        yield Result(WARNING, "nothing captures from it: start Zeek's workers, or restart those that run, if the "
                              "interface was made anew since they started: they have lost it")


def reports(patient: Patient) -> Iterator[Result]:
    assert patient.attached is not None
    if lock.holder(lock.DEFAULT) is None:
        return
    state = patient.attached.state
    try:
        acknowledged = json.loads(lock.DEFAULT.with_suffix(".json").read_text())["interfaces"]
        checkpoint = acknowledged[printable(patient.link.name)]
        if checkpoint["id"] != state["id"]:
            raise LookupError("of a program before this one")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - checkpoint["since_boot"]
        since, patience, taken = "", KEEP_SECONDS, f"Zeek has taken a report {age:.0f} s ago"
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        age = time.time() - seconds(state["attached_at"])
        since, patience, taken = ", since it was attached", FIRST_REPORT, "Zeek has taken no report yet"
    if age > patience:
        yield Result(WARNING, f"Zeek has taken no report for {_duration(age)}{since}: the publisher's log says why "
                              f"(`journalctl -u {systemd.PUBLISHER}`, or xdp-erm-publish.log in zeekctl's spool "
                              "directory)")
    else:
        yield Result(OK, taken)


def _duration(length: float) -> str:
    """`length`: seconds."""
    return f"{length:.0f} s" if length < 300 else f"{length / 60:.0f} minutes"


HOST_CHECKS: tuple[Callable[[], Iterator[Result]], ...] = (kernel, rights, modules, publisher, fanout)
#: Of any interface.
LINK_CHECKS: tuple[Callable[[Patient], Iterator[Result]], ...] = (interface, place, address, mtu, allow_lists)
#: Of one that our program is attached to.
PROGRAM_CHECKS: tuple[Callable[[Patient], Iterator[Result]], ...] = (
    mode, run_by_driver, isolated, offloads, buffers, packets, losses, queues, captured, reports)
