"""The cable between switch and sensor: a veth pair with each end in a network namespace of its own."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import time

from pyroute2 import IPRoute

from ..errors import XdpErmError
from .namespace import Namespace

SWITCH_INTERFACE = "switch0"
SENSOR_INTERFACE = "sensor0"

# Room for a full mirrored frame (1554 bytes of outer IP) and for some jumbo ones; veth refuses native XDP above 3506.
MTU = 3500
MAX_FRAME_LEN = MTU + 14
CARRIER_TIMEOUT = 10.0  # seconds


class Cable:
    """Both namespaces, the veth pair between them, and the switch's sending socket. Closing it removes all of it."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            self.switch, self.sensor = _quiet_namespace(stack), _quiet_namespace(stack)
            with self.switch.entered():
                self._sender = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            self.plug()
            self._stack = stack.pop_all()

    def __enter__(self) -> Cable:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def plug(self) -> None:
        """Make the pair and bring it up; again after one end has been deleted, which deletes the other."""
        with self.switch.entered(), IPRoute() as route:
            peer = {"ifname": SENSOR_INTERFACE, "mtu": MTU, "net_ns_fd": self.sensor.fd}
            route.link("add", ifname=SWITCH_INTERFACE, kind="veth", mtu=MTU, peer=peer)
            _bring_up(route, SWITCH_INTERFACE)
            self._sender.bind((SWITCH_INTERFACE, 0))
        with self.sensor.entered(), IPRoute() as route:
            _bring_up(route, SENSOR_INTERFACE)
        self.wait_for_carrier()

    def send(self, frame: bytes) -> None:
        """Put one Ethernet frame on the cable, from the switch to the sensor."""
        self._sender.send(frame)

    def wait_for_carrier(self, sensor_interface: str = SENSOR_INTERFACE) -> None:
        """Wait until both ends are up: what is sent before that is lost. Attaching XDP can take a link down."""
        deadline = time.monotonic() + CARRIER_TIMEOUT
        for namespace, name in ((self.switch, SWITCH_INTERFACE), (self.sensor, sensor_interface)):
            with namespace.entered(), IPRoute() as route:
                while route.link("get", ifname=name)[0].get_attr("IFLA_OPERSTATE") != "UP":
                    if time.monotonic() > deadline:
                        raise XdpErmError(f"{name}: no carrier after {CARRIER_TIMEOUT:.0f} seconds")
                    time.sleep(0.01)


def _quiet_namespace(stack: contextlib.ExitStack) -> Namespace:
    """Make a namespace whose kernel sends nothing of its own: no IPv4 address, no IPv6 at all."""
    namespace = Namespace()
    stack.callback(namespace.close)
    with namespace.entered():
        setting = pathlib.Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
        if setting.exists():
            setting.write_text("1")
    return namespace


def _bring_up(route: IPRoute, name: str) -> None:
    route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
