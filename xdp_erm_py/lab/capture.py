"""Mirror traffic out of a capture file: classic pcap, either byte order, micro- or nanoseconds."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import XdpErmError
from ..program import reference
from ..settings import InterfaceConfig
from .cable import MAX_FRAME_LEN
from .traffic import Packet

# The first four bytes tell the byte order, and whether timestamps are in micro- or nanoseconds.
BYTE_ORDERS = {
    bytes.fromhex("a1b2c3d4"): ">",
    bytes.fromhex("a1b23c4d"): ">",
    bytes.fromhex("d4c3b2a1"): "<",
    bytes.fromhex("4d3cb2a1"): "<",
}
PCAPNG_MAGIC = bytes.fromhex("0a0d0d0a")
LINKTYPE_ETHERNET = 1
MAX_CAPTURED_LEN = 262144  # libpcap's own limit


def captured(path: Path, config: InterfaceConfig) -> Iterator[Packet]:
    """Yield each frame of the file with what is left of it once decapsulated; frames that are not ERM stay as they are.

    Raises XdpErmError for a frame that the lab's cable does not carry.
    """
    for number, frame in enumerate(read_pcap(path), 1):
        if not reference.ETHERNET_LEN <= len(frame) <= MAX_FRAME_LEN:
            limits = f"{reference.ETHERNET_LEN} to {MAX_FRAME_LEN}"
            raise XdpErmError(f"{path}: frame {number} has {len(frame)} bytes, the lab's cable carries {limits}")
        yield Packet(frame, reference.decapsulate(frame, config).frame)


def read_pcap(path: Path) -> Iterator[bytes]:
    """Yield the frames of a classic pcap file, as many bytes of each as were captured.

    Raises XdpErmError if the file cannot be read, is of another format or link type, or ends inside a record.
    """
    try:
        with path.open("rb") as file:
            yield from _read_records(file, path)
    except OSError as error:
        raise XdpErmError(f"{path}: {error.strerror}") from error


def _read_records(file: BinaryIO, path: Path) -> Iterator[bytes]:
    header = file.read(24)
    if header[:4] == PCAPNG_MAGIC:
        raise XdpErmError(f"{path}: is a pcapng file, the lab reads classic pcap: editcap -F pcap {path} OUT.pcap")
    order = BYTE_ORDERS.get(header[:4])
    if order is None or len(header) < 24:
        raise XdpErmError(f"{path}: is not a pcap file, it starts with {header[:4].hex(' ') or 'nothing'}")
    link_type = struct.unpack(order + "I", header[20:])[0] & 0xFFFF  # above it: whether frames carry their FCS
    if link_type != LINKTYPE_ETHERNET:
        raise XdpErmError(f"{path}: has link type {link_type}, the lab needs Ethernet (1): capture on the mirror's NIC")
    for number in itertools.count(1):
        record = file.read(16)
        if not record and number > 1:
            return
        if len(record) < 16:
            raise XdpErmError(f"{path}: ends inside record {number}: the capture is empty or was cut off")
        (captured_len,) = struct.unpack(order + "I", record[8:12])
        if captured_len > MAX_CAPTURED_LEN:
            raise XdpErmError(f"{path}: record {number} claims {captured_len} bytes: the file is damaged")
        frame = file.read(captured_len)
        if len(frame) < captured_len:
            raise XdpErmError(f"{path}: ends inside record {number}: the capture was cut off")
        yield frame
