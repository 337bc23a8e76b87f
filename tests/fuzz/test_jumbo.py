"""Frames longer than a test run shows the program, on a cable: in generic mode it gets them whole."""

from __future__ import annotations

import random
import socket

from frames import INNER, SWITCH, wrap

from fuzz.generator import LONGEST
from xdp_erm_py.interface import loader
from xdp_erm_py.lab import cable
from xdp_erm_py.program.reference import decapsulate
from xdp_erm_py.settings import InterfaceConfig

SECONDS = 60  # for one frame
FRAMES = 300
# A tag would come to the tap beside the frame.
CONFIG = InterfaceConfig(mode="generic", vlan="strip", depth=2, sources=(f"{SWITCH}/32",))


def test_jumbo_frames(xdp, monkeypatch):
    monkeypatch.setattr(cable, "MTU", LONGEST)
    draw = random.Random(1)
    with cable.Cable() as wire, wire.sensor.entered(), \
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:  # 3: ETH_P_ALL
        loader.attach(cable.SENSOR_INTERFACE, CONFIG)
        wire.wait_for_carrier()
        tap.bind((cable.SENSOR_INTERFACE, 0))
        tap.settimeout(SECONDS)
        for _ in range(FRAMES):
            mirrored = bytes(INNER) + draw.randbytes(draw.randrange(3400, LONGEST - 200))
            padding = draw.randbytes(draw.choice((0, 0, 1, 30)))
            frame = bytes(wrap(wrap(mirrored) if draw.random() < 0.2 else mirrored)) + padding
            wire.send(frame)
            left = tap.recv(2 * LONGEST)
            assert left == decapsulate(frame, CONFIG).frame == mirrored
