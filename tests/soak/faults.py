"""The faults, each under traffic. What a fault may cost is said with it; the books allow no more."""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import other_program
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from xdp_erm_py.lab.cable import MTU, SENSOR_INTERFACE, SWITCH_INTERFACE
from xdp_erm_py.lab.namespace import Namespace
from xdp_erm_py.settings import InterfaceConfig

from .books import SECONDS
from .wire import LONG, NARROW

if TYPE_CHECKING:
    from .soak import Soak


class Fault(NamedTuple):
    name: str
    act: Callable[[Soak], None]
    bare: bool = False
    """There may be no program for a while: frames go on as they came, and nobody counts them."""
    downs: int = 0
    """How often the interface stops taking frames for a while. They are dropped before it then, which the other end
    counts; but those that wait to be received vanish from every counter of the kernel."""


FAULTS: list[Fault] = []


def _fault(name: str, bare: bool = False, downs: int = 0) -> Callable[[Callable[[Soak], None]], None]:
    def add(act: Callable[[Soak], None]) -> None:
        FAULTS.append(Fault(name, act, bare, downs))
    return add


def configuration(soak: Soak, mode: str = "native") -> InterfaceConfig:
    """Another one than that in force, of the same mode."""
    draw = soak.random
    while True:
        sources = draw.choice(((), NARROW["sources"], LONG))
        config = InterfaceConfig(
            mode=mode, depth=draw.randint(1, 3) if sources else 1, vlan=draw.choice(("restore", "tagged", "strip")),
            port=draw.choice((NARROW["port"], (7932, 7933))), sources=sources,
            targets=draw.choice(((), NARROW["targets"])), sessions=draw.random() < 0.7,
            **soak.spreading() if mode == "native" else {})
        if config != soak.config:
            return config


def _set(index: int, **what: object) -> None:
    with IPRoute() as route:
        route.link("set", index=index, **what)


def _switch(soak: Soak, **what: object) -> None:
    with soak.cable.switch.entered(), IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=SWITCH_INTERFACE)[0], **what)


@_fault("swap")
def _swap(soak: Soak) -> None:
    soak.attach(configuration(soak))


@_fault("swap, killed")
def _kill_swap(soak: Soak) -> None:
    config = configuration(soak)
    soak.kill("attach", config)
    soak.attach(config)


@_fault("two swaps at once")
def _two_swaps(soak: Soak) -> None:
    one, other = configuration(soak), configuration(soak)
    processes = [soak.start("attach", config) for config in (one, other)]
    for process in processes:
        soak.finish(process)
    soak.attach(other)


@_fault("swap, out of descriptors")
def _swap_without_descriptors(soak: Soak) -> None:
    config = configuration(soak)
    soak.finish(soak.start("attach", config, under=("prlimit", f"--nofile={soak.random.randint(5, 8)}")), status=1)
    soak.attach(config)


@_fault("detach and attach", bare=True, downs=2)
def _detach(soak: Soak) -> None:
    soak.command("detach")
    soak.attach(configuration(soak))


@_fault("detach, killed", bare=True, downs=2)
def _kill_detach(soak: Soak) -> None:
    soak.kill("detach")
    soak.attach(configuration(soak))


@_fault("attach, killed", bare=True, downs=2)
def _kill_attach(soak: Soak) -> None:
    soak.command("detach")
    config = configuration(soak)
    soak.kill("attach", config)
    soak.attach(config)


@_fault("detach during attach", bare=True, downs=2)
def _detach_during_attach(soak: Soak) -> None:
    config = configuration(soak)
    processes = [soak.start("attach", config), soak.start("detach")]
    for process in processes:
        soak.finish(process)
    soak.attach(config)


@_fault("generic mode and back", bare=True, downs=2)
def _generic(soak: Soak) -> None:
    soak.attach(configuration(soak, "generic"))
    soak.nap(0.3)
    soak.attach(configuration(soak))


@_fault("interface down and up", downs=2)
def _down(soak: Soak) -> None:
    _set(soak.index, state="down")
    soak.nap(0.3)
    _set(soak.index, state="up")
    soak.cable.wait_for_carrier(soak.name)


@_fault("link flaps", downs=3)
def _flap(soak: Soak) -> None:
    for _ in range(3):
        _switch(soak, state="down")
        soak.nap(0.1)
        _switch(soak, state="up")
        soak.cable.wait_for_carrier(soak.name)


@_fault("MTU below and above what fits", downs=2)
def _mtu(soak: Soak) -> None:
    _set(soak.index, mtu=1000)
    soak.nap(0.2)
    try:
        _switch(soak, mtu=9000)
        soak.wrong.append("the switch's end takes an MTU that native XDP at the other does not")
        _switch(soak, mtu=MTU)
    except NetlinkError:
        pass
    soak.attach(configuration(soak))
    _set(soak.index, mtu=MTU)


@_fault("renamed", downs=2)
def _rename(soak: Soak) -> None:
    for name in ("renamed0", SENSOR_INTERFACE):
        try:
            _set(soak.index, ifname=name)
        except NetlinkError:  # before Linux 6.2 only while it is down
            _set(soak.index, state="down", ifname=name)
            _set(soak.index, state="up")
        soak.name = name
        soak.cable.wait_for_carrier(name)
        soak.attach(configuration(soak))


@_fault("moved to another network namespace and back", bare=True, downs=2)
def _move(soak: Soak) -> None:
    elsewhere = Namespace()
    try:
        _set(soak.index, net_ns_fd=elsewhere.fd)
        soak.nap(0.1)
        with elsewhere.entered(), IPRoute() as route:
            index = route.link_lookup(ifname=soak.name)[0]
            route.link("set", index=index, net_ns_fd=soak.cable.sensor.fd)
    finally:
        elsewhere.close()
    soak.replug()
    _set(soak.index, state="up")
    soak.cable.wait_for_carrier(soak.name)
    soak.attach(configuration(soak))


@_fault("deleted and created anew", bare=True, downs=2)
def _anew(soak: Soak) -> None:
    soak.hold()  # what the interfaces counted goes with them
    with IPRoute() as route:
        route.link("del", index=soak.index)
    soak.cable.plug()
    soak.replug()
    soak.go_on()
    soak.attach(configuration(soak))


@_fault("somebody else's program instead of ours", bare=True, downs=2)
def _foreign(soak: Soak) -> None:
    with IPRoute() as route:
        route.link("set", index=soak.index, xdp_fd=-1)
    other_program.attach(soak.name, "native")
    # Whoever takes our program off takes what it knew of the offloads.
    subprocess.run(["ethtool", "-K", soak.name, "rx", "on", "rxvlan", "on", "rx-vlan-stag-hw-parse", "on"], check=True,
                   timeout=SECONDS)
    soak.command("attach", configuration(soak), status=1)
    soak.attach(configuration(soak), "--force")


@_fault("publisher killed")
def _kill_publisher(soak: Soak) -> None:
    soak.nap(0.5)
    soak.publisher.stop(signal.SIGKILL)
    soak.nap(0.5)
    soak.publisher.start()


@_fault("publisher killed at once, again and again")
def _restart_publisher(soak: Soak) -> None:
    for _ in range(3):
        soak.publisher.stop(soak.random.choice((signal.SIGKILL, signal.SIGTERM)))
        soak.publisher.start(wait=False)
        soak.nap(0.8)
    soak.publisher.stop(signal.SIGTERM)
    soak.publisher.start()


@_fault("publisher out of descriptors")
def _publisher_without_descriptors(soak: Soak) -> None:
    with soak.publisher.limited(resource.RLIMIT_NOFILE):
        soak.nap(1)


@_fault("publisher's disk full")
def _full_disk(soak: Soak) -> None:
    with soak.publisher.limited(resource.RLIMIT_FSIZE):
        soak.nap(1)


@_fault("publisher frozen")
def _freeze_publisher(soak: Soak) -> None:
    soak.publisher.send(signal.SIGSTOP)
    soak.nap(1)
    soak.publisher.send(signal.SIGCONT)


@_fault("Zeek frozen, and detached meanwhile", bare=True, downs=2)
def _freeze_zeek(soak: Soak) -> None:
    soak.zeek.mood = "frozen"
    soak.command("detach")
    soak.attach(configuration(soak))
    soak.nap(0.5)
    soak.zeek.mood = "ok"
    soak.zeek.restart()  # what it swallowed, it will not answer


@_fault("Zeek restarted")
def _restart_zeek(soak: Soak) -> None:
    for _ in range(2):
        soak.zeek.restart()
        soak.nap(0.3)


@_fault("Zeek answers garbage")
def _garbage(soak: Soak) -> None:
    soak.zeek.mood = soak.random.choice(("garbage", "large"))
    soak.nap(0.7)
    soak.zeek.mood = "ok"


