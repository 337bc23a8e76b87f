"""The lab: its traffic, its counting workers, that its claims hold, and that it notices when they do not."""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import operator
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from xdp_erm_py import lab, shared
from xdp_erm_py.errors import UsageError, XdpErmError
from xdp_erm_py.lab.cable import MAX_FRAME_LEN, SENSOR_INTERFACE, Cable
from xdp_erm_py.lab.capture import captured, read_pcap
from xdp_erm_py.lab.fanout import FanoutWorkers, flow_key
from xdp_erm_py.lab.traffic import Packet, internet_checksum, synthetic
from xdp_erm_py.program.reference import decapsulate
from xdp_erm_py.settings import InterfaceConfig
from xdp_erm_py.shared import COUNTERS

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CAPTURE = REPOSITORY.parent / "shared" / "captures" / "hp-erm-1.cap"
LAB = [sys.executable, "-m", "xdp_erm_py", "lab"]
TIMEOUT = 120  # seconds

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")
needs_zeek = pytest.mark.skipif(not (shutil.which("zeek") or shutil.which("zeek", path="/opt/zeek/bin")),
                                reason="no Zeek on PATH or in /opt/zeek")
needs_capture = pytest.mark.skipif(not CAPTURE.exists(), reason=f"no real capture at {CAPTURE}")


# Traffic

PACKETS = list(synthetic(flows=100, packets=2000))


def test_synthetic_traffic_is_the_same_each_time():
    assert list(synthetic(flows=100, packets=2000)) == PACKETS


def test_synthetic_traffic_is_varied():
    mirrored = [Ether(packet.mirrored) for packet in PACKETS]
    assert len({packet.mirrored for packet in PACKETS}) == len(PACKETS)
    assert {frame.type for frame in mirrored} == {0x8100}
    assert len({frame[Dot1Q].vlan for frame in mirrored}) > 2
    assert len({frame[Dot1Q].prio for frame in mirrored}) == 8
    for kind in ((IP, TCP), (IP, UDP), (IPv6, TCP), (IPv6, UDP)):
        assert sum(all(layer in frame for layer in kind) for frame in mirrored) > 100
    # Without the tag that went into the ERM header.
    sizes = [len(packet.mirrored) - 4 for packet in PACKETS]
    assert (min(sizes), max(sizes)) == (60, 1514)


def test_synthetic_flows_go_both_ways_and_through_several_sessions():
    directions, sessions, tagged = (collections.defaultdict(set) for _ in range(3))
    for packet in PACKETS:
        outer, flow = Ether(packet.sent), flow_key(packet.mirrored)
        network = Ether(packet.mirrored)[Dot1Q].payload
        directions[flow].add(network.src)
        sessions[flow].add((outer[IP].src, outer[UDP].sport))
        tagged[flow].add(bytes(outer[UDP].payload)[11])
    assert len(directions) == 100
    assert {len(sources) for sources in directions.values()} == {2}
    assert len(set().union(*sessions.values())) > 2
    assert {len(pairs) for pairs in sessions.values()} == {1, 2}
    assert {0x80} in tagged.values() and {0, 0x80} in tagged.values()


@pytest.mark.parametrize("count", [1, 4])
def test_synthetic_traffic_comes_in_as_many_sessions_as_asked_for(count):
    outer = [Ether(packet.sent) for packet in synthetic(flows=100, packets=200, sessions=count)]
    assert len({(packet[IP].src, packet[UDP].sport) for packet in outer}) == count


def test_synthetic_checksums_are_right():
    for packet in PACKETS:
        for data in packet:
            frame = Ether(data)
            layer = frame
            while layer:
                # The switch sends no checksum in the outer UDP header.
                if "chksum" in layer.fields and layer.fields["chksum"] != 0:
                    del layer.chksum
                layer = layer.payload
            assert bytes(frame) == data


def test_checksum_of_rfc_1071():
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2
    assert internet_checksum(b"\x01") == 0xFFFF - 0x0100
    assert internet_checksum(b"\xff\xff") == 0xFFFF


def test_the_reference_leaves_of_synthetic_packets_what_was_mirrored():
    for packet in PACKETS:
        result = decapsulate(packet.sent, InterfaceConfig())
        assert (result.verdict, result.levels, result.inner_truncated) == ("decapsulated", 1, False)
        assert result.frame == packet.mirrored


def test_flow_key_is_the_same_in_both_directions_and_with_a_tag():
    there = Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2)
    back = Ether() / Dot1Q(vlan=7) / IP(src="10.0.0.2", dst="10.0.0.1") / UDP(sport=2, dport=1)
    crossed = Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=2, dport=1)
    assert flow_key(bytes(there)) == flow_key(bytes(back)) != flow_key(bytes(crossed))
    assert flow_key(bytes(Ether() / IP(proto=47))) is None
    assert flow_key(bytes(Ether(type=0x0806))) is None


def test_flow_key_of_a_fragment_has_no_ports():
    first = Ether() / IP(src="10.0.0.1", dst="10.0.0.2", flags="MF") / UDP(sport=1, dport=2)
    last = Ether() / IP(src="10.0.0.1", dst="10.0.0.2", frag=1) / b"anything"
    last[IP].proto = 17
    assert flow_key(bytes(first)) == flow_key(bytes(last)) is not None


# Captures

def pcap(
    order: str = "<", magic: int = 0xA1B2C3D4, link_type: int = 1, frames: tuple[bytes, ...] = (bytes(60),)
) -> bytes:
    records = (struct.pack(order + "IIII", 1, 2, len(frame), len(frame)) + frame for frame in frames)
    return struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link_type) + b"".join(records)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("magic", [0xA1B2C3D4, 0xA1B23C4D])
def test_pcap_variants(tmp_path, order, magic):
    frames = (b"first" * 12, b"second" * 200)
    file = tmp_path / "file.pcap"
    file.write_bytes(pcap(order, magic, 1, frames))
    assert tuple(read_pcap(file)) == frames


def test_a_pcap_out_of_a_pipe(tmp_path):
    """As of `<(zcat FILE)`: it can be read once, and both runs need it."""
    erm = synthetic(1, 3)
    content = pcap(frames=[packet.sent for packet in erm])
    ours, theirs = os.pipe()
    with os.fdopen(theirs, "wb") as pipe:
        pipe.write(content)
    args = argparse.Namespace(pcap=pathlib.Path(f"/dev/fd/{ours}"), flows=None, packets=None, sessions=None,
                              encapsulation=None)
    traffic = lab._traffic(args)
    os.close(ours)
    assert [packet.sent for packet in traffic()] == [packet.sent for packet in traffic()] != []


def test_pcap_whose_frames_carry_their_fcs(tmp_path):
    file = tmp_path / "file.pcap"
    file.write_bytes(pcap(link_type=0x44000001))
    assert list(read_pcap(file)) == [bytes(60)]


@pytest.mark.parametrize("content, message", [
    (b"", "is not a pcap file, it starts with nothing"),
    (b"GIF89a" * 10, "is not a pcap file, it starts with 47 49 46 38"),
    (bytes.fromhex("0a0d0d0a") + bytes(60), "is a pcapng file, .*: editcap -F pcap"),
    (pcap()[:20], "is not a pcap file"),
    (pcap(link_type=113), r"link type 113, the lab needs Ethernet \(1\)"),
    (pcap(frames=()), "ends inside record 1: the capture is empty"),
    (pcap()[:30], "ends inside record 1"),
    (pcap(frames=(bytes(60), bytes(60)))[:-1], "ends inside record 2"),
    (pcap(frames=()) + struct.pack("<IIII", 1, 2, 1 << 31, 60), "record 1 claims 2147483648 bytes"),
    (pcap(frames=(bytes(60), bytes(13))), "frame 2 has 13 bytes"),
    (pcap(frames=(bytes(MAX_FRAME_LEN + 1),)), f"frame 1 has {MAX_FRAME_LEN + 1} bytes, .* 14 to {MAX_FRAME_LEN}"),
])
def test_bad_captures(tmp_path, content, message):
    file = tmp_path / "file.pcap"
    file.write_bytes(content)
    with pytest.raises(XdpErmError, match=f"^{file}: .*{message}"):
        list(captured(file, InterfaceConfig()))


def test_capture_that_is_not_there(tmp_path):
    with pytest.raises(XdpErmError, match=r"missing\.pcap: No such file or directory"):
        list(captured(tmp_path / "missing.pcap", InterfaceConfig()))


@needs_capture
def test_real_capture_is_taken_apart():
    packets = list(captured(CAPTURE, InterfaceConfig()))
    assert [packet.sent != packet.mirrored for packet in packets] == [False, False, True, True] * 2
    assert [packet.sent for packet in packets] == list(read_pcap(CAPTURE))


# Cable and workers

def other_frames(count: int) -> list[Packet]:
    """Frames of the EtherType for experiments, each another."""
    frames = (bytes(12) + b"\x88\xb5" + number.to_bytes(46, "big") for number in range(count))
    return [Packet(frame, frame) for frame in frames]


@needs_root
def test_workers_count_what_arrives():
    packets = list(itertools.islice(PACKETS, 100))
    with Cable() as cable, FanoutWorkers(cable, 3, operator.attrgetter("sent")) as workers:
        lab.mirror(cable, packets, workers)
        result = workers.finish()
    assert (result.sent, result.mirrored, sum(result.packets)) == (100, 100, 100)
    assert (result.identical, result.missing, result.unexpected, result.dropped) == (0, 0, 0, 0)
    assert set(result.workers_by_flow) == {flow_key(packet.mirrored) for packet in packets}


@needs_root
def test_workers_see_all_that_comes_in_and_nothing_that_goes_out():
    with Cable() as cable, FanoutWorkers(cable, 3, operator.attrgetter("sent")) as workers:
        with cable.sensor.entered(), IPRoute() as route, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sensor:
            assert route.link("get", ifname=SENSOR_INTERFACE)[0].get_attr("IFLA_PROMISCUITY") == 3
            sensor.bind((SENSOR_INTERFACE, 0))
            sensor.send(other_frames(1)[0].sent)
        result = workers.finish()
    assert (sum(result.packets), result.unexpected) == (0, 0)


@needs_root
@pytest.mark.parametrize("frame", [
    Ether() / Dot1Q(vlan=10, prio=5) / IP() / UDP() / (b"x" * 50),
    Ether() / Dot1Q(type=0x88A8, vlan=10, id=1) / Dot1Q(vlan=11) / IP() / UDP() / (b"x" * 50),
    Ether(type=0x88A8) / Dot1Q(vlan=10) / Dot1Q(vlan=11) / IP() / UDP() / (b"x" * 50),
])
def test_tags_are_put_back_as_they_were(frame):
    packet = Packet(bytes(frame), bytes(frame))
    with Cable() as cable, FanoutWorkers(cable, 2, operator.attrgetter("sent")) as workers:
        lab.mirror(cable, [packet], workers)
        result = workers.finish()
    assert (result.sent, result.missing, result.unexpected) == (1, 0, 0)


@needs_root
def test_workers_notice_altered_doubled_and_lost_frames(monkeypatch):
    monkeypatch.setattr("xdp_erm_py.lab.fanout.SILENCE_TIMEOUT", 0.5)
    packets = other_frames(4)
    with Cable() as cable, FanoutWorkers(cable, 2, operator.attrgetter("sent")) as workers:
        for packet in packets[:2]:
            cable.send(packet.sent)
        cable.send(packets[2].sent[:-1] + b"!")
        assert not workers.take(packets)  # the fourth never comes
        cable.send(packets[0].sent)
        result = workers.finish()
    assert (result.sent, result.missing, result.unexpected) == (4, 2, 2)


@needs_root
def test_a_cable_stays_out_of_this_network():
    before = os.readlink("/proc/thread-self/ns/net"), sorted(os.listdir("/sys/class/net"))
    with Cable() as cable:
        descriptors = cable.switch.fd, cable.sensor.fd
        namespaces = {os.stat(descriptor).st_ino for descriptor in descriptors}
        assert len(namespaces) == 2 and os.stat("/proc/thread-self/ns/net").st_ino not in namespaces
        assert (os.readlink("/proc/thread-self/ns/net"), sorted(os.listdir("/sys/class/net"))) == before
    for descriptor in descriptors:
        with pytest.raises(OSError):
            os.fstat(descriptor)


# The command

def run_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*LAB, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def table(output: str) -> dict[str, list[str]]:
    """The plain table's rows: the label, and what stands for the runs without and with xdp-erm."""
    lines = output.splitlines()
    heading = next(line for line in lines if "without xdp-erm" in line)
    columns = heading.index("without xdp-erm"), heading.index("with xdp-erm")
    rows = lines[lines.index(heading) + 2:]
    return {row[:columns[0]].strip(): [row[columns[0]:columns[1]].strip(), row[columns[1]:].strip()] for row in rows}


@pytest.mark.check
@needs_root
def test_synthetic_run():
    done = run_lab("--packets", "8000")
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert rows["sent"] == ["8000 packets", "8000 packets"]
    assert rows["arrived"] == ["8000 packets", "8000 packets"]
    assert rows["byte-identical"] == ["0 of 8000 mirrored", "8000 of 8000 mirrored"]
    assert rows["flows"][1] == "2000, 0 split"
    assert "decapsulated: 8000 packets" in done.stdout
    packets = [int(rows[f"worker {number}"][1].split()[-2]) for number in range(1, 5)]
    assert sum(packets) == 8000
    assert all(1600 <= count <= 2400 for count in packets), packets


@needs_root
def test_workers_and_flows_are_as_many_as_asked_for():
    done = run_lab("--workers", "2", "--flows", "50", "--packets", "500")
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert [label for label in rows if label.startswith("worker")] == ["worker 1", "worker 2"]
    assert rows["flows"][1] == "50, 0 split"


@needs_root
def test_capture_run(tmp_path):
    file = tmp_path / "file.pcap"
    packets = PACKETS[:20] + other_frames(3) + PACKETS[:5]  # the last ones come twice
    file.write_bytes(pcap(frames=tuple(packet.sent for packet in packets)))
    done = run_lab("--pcap", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert rows["sent"] == rows["arrived"] == ["28 packets", "28 packets"]
    assert rows["byte-identical"] == ["0 of 25 mirrored", "25 of 25 mirrored"]
    assert "\nother: 3 packets, 180 bytes\n" in done.stdout


@needs_root
@pytest.mark.parametrize("kind", shared.ENCAPSULATIONS)
def test_any_encapsulation(kind, tmp_path):
    done = run_lab("--encapsulation", kind, "--flows", "50", "--packets", "500", "--sessions", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert table(done.stdout)["byte-identical"] == ["0 of 500 mirrored", "500 of 500 mirrored"]
    # Of a capture all are taken.
    file = tmp_path / "file.pcap"
    file.write_bytes(pcap(frames=tuple(packet.sent for packet in synthetic(5, 20, encapsulation=kind))))
    done = run_lab("--pcap", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert table(done.stdout)["byte-identical"] == ["0 of 20 mirrored", "20 of 20 mirrored"]


@needs_root
@needs_capture
def test_real_capture_run():
    done = run_lab("--pcap", str(CAPTURE))
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert rows["arrived"] == ["8 packets", "8 packets"]
    assert rows["byte-identical"] == ["0 of 4 mirrored", "4 of 4 mirrored"]
    assert rows["flows"][1] == "2, 0 split"
    assert "decapsulated: 4 packets, 608 bytes\nother: 4 packets, 400 bytes\n" in done.stdout


@needs_root
def test_a_program_that_does_nothing_is_noticed(monkeypatch, capsys):
    zero = {name: {"packets": 0, "bytes": 0} for name in COUNTERS}
    monkeypatch.setattr(lab.loader, "attach", lambda name, config: [])
    monkeypatch.setattr(lab.stats, "snapshot", lambda name: [{"counters": zero}])
    assert lab.run(argparse.Namespace(pcap=None, workers=4, flows=100, packets=100, sessions=None,
                                      encapsulation=None, zeek=False)) == 1
    assert capsys.readouterr().err.splitlines() == [
        "xdp-erm lab: with xdp-erm, 100 of 100 packets did not arrive as they should",
        "xdp-erm lab: with xdp-erm, 100 frames arrived that should not: altered, or more than once",
        "xdp-erm lab: xdp-erm counted 0 packets, 100 were sent",
        "xdp-erm lab: xdp-erm counted 0 packets as decapsulated, 100 should be",
    ]


@needs_root
@needs_zeek
def test_run_with_zeek():
    done = run_lab("--zeek", "--flows", "500", "--packets", "3000")
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert rows["arrived"] == ["3000 packets", "3000 packets"]
    assert rows["flows"] == ["4, 0 split", "500, 0 split"]
    packets = [int(rows[f"worker {number}"][1].split()[-2]) for number in range(1, 5)]
    assert sum(packets) == 3000
    assert all(450 <= count <= 1050 for count in packets), packets
    assert "byte-identical" not in rows


def test_flows_that_zeek_does_not_log_are_noticed():
    result = lab.Result([1], sent=1, mirrored=1, unlogged_flows=1)
    counters = {name: {"packets": 1 if name == "decapsulated" else 0, "bytes": 0} for name in COUNTERS}
    assert lab.find_faults(result, result, counters) == ["with xdp-erm, 1 mirrored flows are in no conn.log"]


def test_split_flows_are_noticed():
    result = lab.Result([1, 1], sent=2, workers_by_flow={flow_key(PACKETS[0].mirrored): {0, 1}})
    counters = {name: {"packets": 2 if name == "other" else 0, "bytes": 0} for name in COUNTERS}
    assert lab.find_faults(result, result, counters) == ["with xdp-erm, 1 flows were split over workers"]


@needs_root
def test_interrupted_run():
    command = [*LAB, "--packets", "100000000"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **output) as running:
        try:
            deadline = time.monotonic() + TIMEOUT
            while running.poll() is None and namespaces_held(running.pid) < 2:
                assert time.monotonic() < deadline, "the lab makes no namespaces"
                time.sleep(0.05)
            running.send_signal(signal.SIGINT)
            _, errors = running.communicate(timeout=TIMEOUT)
        finally:
            running.kill()
    assert (running.returncode, errors) == (130, "")


def namespaces_held(process: int) -> int:
    """The network namespaces that a process has open."""
    names = set()
    for descriptor in pathlib.Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.add(os.readlink(descriptor))
    return sum(name.startswith("net:[") for name in names)


def test_table_fits_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    flows = {(6, number, number): {number % 4} for number in range(2000)}
    without = lab.Result([0, 1000, 0, 99000], sent=100_000, mirrored=100_000, workers_by_flow=flows)
    with_xdp_erm = lab.Result([25_000] * 4, sent=100_000, mirrored=100_000, identical=100_000, workers_by_flow=flows)
    lab.print_report(without, with_xdp_erm, {"decapsulated": {"packets": 100_000, "bytes": 80_000_000}})
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output
    for cell in ("██        25.0%   25000   500", "███████▉  99.0%   99000   500", "100000 of 100000 mirrored"):
        assert cell in output


def test_synthetic_settings_do_not_go_with_a_capture():
    args = argparse.Namespace(pcap=CAPTURE, workers=4, flows=None, packets=3, sessions=None, encapsulation=None)
    with pytest.raises(UsageError, match="--flows, --packets and --sessions are for synthetic traffic"):
        lab.run(args)


@pytest.mark.parametrize("arguments", [("--workers", "0"), ("--workers", "257"), ("--flows", "-1"),
                                       ("--flows", "65537"), ("--packets", "many")])
def test_bad_numbers(arguments):
    done = run_lab(*arguments)
    assert done.returncode == 2
    assert f"{arguments[1]!r} is not a number from 1 to" in done.stderr


def test_without_root():
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run([*drop, *LAB], cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "xdp-erm: the lab makes network namespaces, which needs root: run it with sudo\n"
