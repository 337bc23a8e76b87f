"""Where decapsulated frames go on: on the CPU they came to, or over several.

A mirror session is one flow to the NIC, so one CPU gets all of it. Two ways lead to others: the program hands each
frame to the CPU of its inner flow (cpumap), or the kernel does so once it is decapsulated (RPS, see rps.py).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import XdpErmError
from ..kernel import rps, sysfs, version
from ..kernel.links import Link, Links
from ..settings import InterfaceConfig, cpu_list, parse_cpu_list
from . import topology

_CPUS = Path("/sys/devices/system/cpu")
_INTERRUPTS = Path("/proc/irq")

#: Drivers whose native XDP is known to redirect where the kernel does not tell, and since which Linux; (0, 0): any that
#: xdp-erm runs on. Others, ixgbevf and nfp for instance, drop what is to be redirected.
_REDIRECTING: dict[str, tuple[int, int]] = {
    "bnxt_en": (0, 0), "ena": (5, 11), "fsl_dpa": (5, 11), "i40e": (0, 0), "ice": (0, 0), "igb": (0, 0),
    "igc": (5, 13), "ixgbe": (0, 0), "mlx5_core": (0, 0), "mvneta": (0, 0), "mvpp2": (0, 0), "sfc": (0, 0),
    "virtio_net": (0, 0),
}

# uapi linux/netdev.h
_DEV_GET, _REDIRECT = 1, 1 << 1  # a command, and a bit of the XDP features


class Plan(NamedTuple):
    """What becomes of `spread` on one interface, in one mode of XDP."""

    how: str
    """none, rps or cpumap"""
    cpus: tuple[int, ...]
    """That take part."""
    reason: str

    def line(self, link: Link) -> str:
        """For people."""
        over = f" over CPUs {cpu_list(self.cpus)}" if self.cpus else ""
        return f"{link.name}: spread: {self.how}{over} ({self.reason})"

    @property
    def lanes(self) -> tuple[int, ...]:
        """The CPUs that the program itself hands frames to."""
        return self.cpus if self.how == "cpumap" else ()


def plan(link: Link, config: InterfaceConfig, mode: str, attached: dict[str, Any] | None = None) -> Plan:
    """How to spread in XDP mode `mode`; `attached` is the state of our program that is there now.

    XdpErmError: what is asked for is impossible there.
    """
    if config.spread == "none":
        return Plan("none", (), "as configured")
    cpus, reason = _cpus(link, config, _found_out(attached, config))
    if config.spread != "auto":
        obstacle = _no_rps(link, mode, cpus) if config.spread == "rps" else _no_cpumap(link, config, mode)
        obstacle = obstacle or (None if cpus else reason)
        if obstacle:
            raise XdpErmError(f"{link.name}: spread: {config.spread} is impossible here: {obstacle}")
        return Plan(config.spread, cpus, reason)
    if not cpus:
        return Plan("none", (), reason)
    # cpumap first: it keeps fragments, ICMP errors and IPv6 flows with flow labels together, which RPS does not.
    obstacle = _no_cpumap(link, config, mode)
    if obstacle is None:
        return Plan("cpumap", cpus, f"frames can be redirected; {reason}")
    if _no_rps(link, mode, cpus) is None:
        return Plan("rps", cpus, f"{obstacle}; {reason}")
    return Plan("none", (), obstacle)


def _found_out(attached: dict[str, Any] | None, config: InterfaceConfig) -> set[int]:
    """The CPUs that were found out for the attached program; none where others were to be avoided, or some were set."""
    if attached is None or attached["config"].get("spread_cpus") or \
            tuple(attached["config"].get("spread_avoid", ())) != config.spread_avoid:
        return set()
    return set((attached.get("spread") or {}).get("cpus", ()))


def _cpus(link: Link, config: InterfaceConfig, before: set[int]) -> tuple[tuple[int, ...], str]:
    """The CPUs, and why these; none, and why. Those found out before stay while they will do.

    Interrupts are moved about all the time (irqbalance), and other CPUs would have the program swapped and frames
    reordered each time.
    """
    online = _listed("online")
    if config.spread_cpus:
        missing = set(config.spread_cpus) - online
        if missing:
            raise XdpErmError(f"{link.name}: spread_cpus: CPU {min(missing)} is not online (online: "
                              f"{cpu_list(sorted(online))})")
        return config.spread_cpus, "as configured"
    avoided, isolated, receiving = set(config.spread_avoid) & online, _listed("isolated"), _receiving(link)
    usable = online - avoided - isolated
    # A NIC with as many queues as there are CPUs has no CPU to itself.
    cpus = usable - receiving or usable
    if before and before <= usable and (before - receiving or cpus == usable):
        return tuple(sorted(before)), "as before"
    left_out = [f"{cpu_list(sorted(those))} {what}" for those, what in (
        (receiving - cpus, "the NIC's"), (avoided, "to be avoided"), (isolated & online, "isolated")) if those]
    reason = f"of {cpu_list(sorted(online))}" + (f", less {', '.join(left_out)}" if left_out else "")
    if not cpus or len(online) == 1 or (cpus == receiving and len(cpus) == 1):
        return (), f"no other CPU is left {reason}; spread_cpus names some"
    return tuple(sorted(cpus)), reason


def _listed(name: str) -> set[int]:
    try:
        return set(parse_cpu_list((_CPUS / name).read_text().strip()))
    except OSError as error:
        raise XdpErmError(f"{_CPUS / name} cannot be read: {error.strerror}") from None


def _receiving(link: Link) -> set[int]:
    """The CPUs that interrupts of the interface, and of those below it, go to; none where there are no interrupts."""
    with Links() as links, sysfs.mounted() as root:
        return {cpu for each in (link, *topology.below(links, link)) for cpu in _interrupted(root, each)}


def _interrupted(root: int, link: Link) -> set[int]:
    cpus: set[int] = set()
    device = f"class/net/{link.name}/device"
    # virtio's are those of the PCI device that it is on.
    for interrupt in _names(root, f"{device}/msi_irqs") or _names(root, f"{device}/../msi_irqs"):
        with contextlib.suppress(OSError):  # not in use
            cpus.update(parse_cpu_list((_INTERRUPTS / interrupt / "effective_affinity_list").read_text().strip()))
    for channel in _names(root, f"{device}/channels"):  # Hyper-V's
        with contextlib.suppress(OSError):
            cpus.update(parse_cpu_list(sysfs.read(root, f"{device}/channels/{channel}/cpu")))
    return cpus


def _names(root: int, path: str) -> list[str]:
    try:
        return sysfs.names(root, path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _no_rps(link: Link, mode: str, cpus: tuple[int, ...]) -> str | None:
    if mode == "generic":
        return "generic XDP runs after receive packet steering"
    if cpus and _listed("isolated").issuperset(cpus):  # it leaves out those that are, and refuses none but those
        return f"the kernel steers no packets to isolated CPUs ({cpu_list(cpus)})"
    return None if rps.masks(link) else "this kernel has no receive packet steering (CONFIG_RPS)"


def _no_cpumap(link: Link, config: InterfaceConfig, mode: str) -> str | None:
    if mode == "generic":
        if config.isolate:
            return "in generic mode it loses the mark that keeps decapsulated frames from the host (isolate)"
        if version.running() < (5, 15):
            return "in generic mode it needs Linux 5.15"
    else:
        redirects = _redirects(link)
        if redirects is False:
            return "the driver's native XDP cannot redirect"
        unknown = _unknown(link) if redirects is None else None
        if unknown:
            return f"native XDP of its driver ({unknown}) is not known to redirect; Linux 6.3 tells"
    return None


def _unknown(link: Link) -> str | None:
    """The driver, of the interface or of one below it, that is not known to redirect; None: they all are."""
    with Links() as links:
        drivers = [sysfs.driver(each) for each in topology.stack(links, link)]
    return next((driver for driver in drivers if driver and (
        driver not in _REDIRECTING or version.running() < _REDIRECTING[driver])), None)


def _redirects(link: Link) -> bool | None:
    """Whether the driver says that its native XDP can redirect; None: the kernel does not tell (before Linux 6.3)."""
    from pyroute2.netlink import NLM_F_REQUEST, genlmsg
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic import GenericNetlinkSocket

    class Netlink(GenericNetlinkSocket):  # type: ignore[misc]
        module_err_level = "debug"  # kernels that do not tell are none to complain of

    class Device(genlmsg):  # type: ignore[misc]
        prefix = "NETDEV_A_DEV_"
        nla_map = tuple((f"NETDEV_A_DEV_{name}", kind) for name, kind in (
            ("UNSPEC", "none"), ("IFINDEX", "uint32"), ("PAD", "none"), ("XDP_FEATURES", "uint64")))

    with contextlib.closing(Netlink()) as netlink:
        try:
            netlink.bind("netdev", Device)
            request = Device()
            request["cmd"], request["version"] = _DEV_GET, 1
            request["attrs"] = [("NETDEV_A_DEV_IFINDEX", link.index)]
            answer = netlink.nlm_request(request, msg_type=netlink.prid, msg_flags=NLM_F_REQUEST)[0]
        except NetlinkError:
            return None
        return bool(answer.get_attr("NETDEV_A_DEV_XDP_FEATURES") & _REDIRECT)
