"""A program that the driver does not run is noticed, and one that it runs is not taken for one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from xdp_erm_py import doctor
from xdp_erm_py.config import InterfaceConfig
from xdp_erm_py.doctor import OK, PROBLEM, WARNING
from xdp_erm_py.interface import loader, ours, running, stats
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.traffic import synthetic

DEFAULT, NATIVE = InterfaceConfig(), InterfaceConfig(mode="native")
PACKET = next(iter(synthetic(flows=1, packets=1))).sent
NOT_RUN = ("the driver does not run the program: it has seen none of the last {} packets: `xdp-erm attach --mode "
           f"generic {SENSOR}` works with every driver")


class Driver:
    """Counts packets that no program gets to see, more each time it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.received = self.each_time = 0
        self.lost: dict[str, int] = {}
        count = Links.statistics

        def statistics(links, link):
            counted = count(links, link)
            self.received += self.each_time
            counted["rx_packets"] += self.received
            return {name: frames + self.lost.get(name, 0) for name, frames in counted.items()}

        monkeypatch.setattr(Links, "statistics", statistics)


@pytest.fixture
def driver(cable, monkeypatch) -> Driver:
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    return Driver(monkeypatch)


def unseen() -> int:
    with Links() as links:
        return running.unseen(links, ours.find(links, SENSOR), 0.3)


def says(check: str) -> list[tuple[str, str]]:
    return [(each.result, each.text) for each in doctor.examine([SENSOR]) if each.check == check]


def wait_until_seen(packets: int) -> None:
    deadline = time.monotonic() + 60
    while sum(counter["packets"] for counter in stats.snapshot(SENSOR)[0]["counters"].values()) < packets:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_driver_that_does_not_run_the_program(driver):
    """From the first minute on: attach says so itself, where packets come at once."""
    driver.each_time = 150
    *_, last = loader.attach(SENSOR, NATIVE)
    assert last.startswith(f"{SENSOR}: warning: the driver does not run the program: it has seen none of the last ")
    assert unseen() > running.SUSPECTED
    (result, text), = says("run_by_driver")
    assert (result, text.startswith("the driver does not run the program")) == (PROBLEM, True)
    assert says("packets") == []  # and not that none has come
    driver.each_time = 0
    assert unseen() == 0  # whatever it was, it is over
    (result, text), = says("run_by_driver")
    assert (result, text.startswith("the program has seen none of ")) == (WARNING, True)


def test_where_it_may_it_goes_to_generic_mode_at_once(driver):
    """Nobody need look and attach again."""
    driver.each_time = 150
    said = loader.attach(SENSOR, DEFAULT)
    assert [line for line in said if "does not run the program in native mode" in line
            and line.endswith("packets: using generic mode, which is slower")]
    assert stats.snapshot(SENSOR)[0]["mode"] == "generic"


def test_a_driver_that_counts_late_keeps_native_mode(driver, cable, monkeypatch):
    """Packets from before seem to come unseen, until the first are seen."""
    driver.each_time = 150
    doubted, done = threading.Event(), threading.Event()
    look = running.unseen

    def unseen_at_first(*arguments) -> int:
        missed = look(*arguments)
        doubted.set()
        return missed

    monkeypatch.setattr(running, "unseen", unseen_at_first)

    def send() -> None:
        doubted.wait(60)
        while not done.wait(0.005):
            cable.send(PACKET)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        said = loader.attach(SENSOR, DEFAULT)
    finally:
        done.set()
        sender.join(60)
    assert len(set(said)) == len(said)
    assert said[-1] == f"{SENSOR}: already attached (native, program {stats.snapshot(SENSOR)[0]['program_id']})"


def test_one_that_stops_running_it(driver, cable):
    """As vmxnet3 does once the MTU is changed."""
    loader.attach(SENSOR, DEFAULT)
    cable.wait_for_carrier()
    for _ in range(200):
        cable.send(PACKET)
    wait_until_seen(200)
    assert says("run_by_driver") == [(OK, "the program sees what comes")]
    driver.each_time = 150
    assert unseen() > 0
    with Links() as links:
        found = ours.find(links, SENSOR)
        assert running.told(found, 240) == NOT_RUN.format(240)
    assert loader.attach(SENSOR, NATIVE)[-1].startswith(f"{SENSOR}: warning: the driver does not run the program")
    # Where it may, the next attach takes the mode that needs nothing of the driver.
    assert any(line.startswith(f"{SENSOR}: the driver does not run the program in native mode: it has seen none of the "
                               "last ") and line.endswith("packets: using generic mode, which is slower")
               for line in loader.attach(SENSOR, DEFAULT))
    driver.each_time = 0
    assert stats.snapshot(SENSOR)[0]["mode"] == "generic"
    assert loader.attach(SENSOR, DEFAULT) == [f"{SENSOR}: already attached (generic, program "
                                              f"{stats.snapshot(SENSOR)[0]['program_id']})"]


def test_packets_that_no_program_sees_are_no_alarm_while_it_sees_others(driver, cable):
    """Some of those that a driver counts are dropped before."""
    loader.attach(SENSOR, DEFAULT)
    cable.wait_for_carrier()
    driver.each_time = 1000
    done = threading.Event()

    def send() -> None:
        while not done.wait(0.005):
            cable.send(PACKET)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        wait_until_seen(10)
        began = time.monotonic()
        assert [unseen() for _ in range(5)] == [0] * 5
        assert time.monotonic() - began < 1.4  # it need not look to the end
    finally:
        done.set()
        sender.join(60)


@pytest.mark.parametrize("packets", [0, running.SUSPECTED - 1])
def test_few_packets_say_nothing(driver, packets):
    loader.attach(SENSOR, DEFAULT)
    driver.received = packets
    began = time.monotonic()
    assert unseen() == 0 and time.monotonic() - began < 0.25
    assert says("run_by_driver") == []


def test_what_came_before_does_not_count(driver, cable):
    """Nor what a driver counts late, once the link is up again."""
    driver.received = 10**9
    loader.attach(SENSOR, DEFAULT)
    assert unseen() == 0
    driver.received += 5000
    assert unseen() == 0  # none comes while we look
    with Links() as links:
        assert running.since(links, ours.find(links, SENSOR)) == (5000, 0, {})


def test_a_driver_whose_counters_begin_anew(driver):
    driver.received = 5000
    loader.attach(SENSOR, DEFAULT)
    driver.received, driver.each_time = 0, 150
    assert unseen() == 0 and says("run_by_driver") == []
    driver.received = 10**6
    loader.attach(SENSOR, InterfaceConfig(vlan="strip"))  # a swap begins anew as well
    assert unseen() > 0


def test_a_state_of_an_earlier_version_has_no_beginning(driver):
    loader.attach(SENSOR, DEFAULT)
    with Links() as links:
        found = ours.find(links, SENSOR)
        del found.state["received"]
        assert running.since(links, found) is None and running.unseen(links, found, 0.1) == 0


def test_frames_that_are_lost_before_any_program(driver, cable):
    loader.attach(SENSOR, DEFAULT)
    assert says("losses") == []
    driver.received = 10000
    driver.lost = {"rx_errors": 25, "rx_length_errors": 20, "rx_missed_errors": 10, "rx_crc_errors": 11}
    lost = "frames were lost before any program, since it was attached"
    assert says("losses") == [
        (WARNING, f"20 {lost} (rx_length_errors): longer than the interface's MTU lets in: raise it (`--set-mtu`)"),
        (WARNING, f"11 {lost} (rx_crc_errors): damaged on the wire: cable, transceiver, duplex")]
    driver.lost = {"rx_errors": 25}
    assert says("losses") == [(WARNING, f"25 {lost} (rx_errors): `ethtool -S {SENSOR}` says why")]


def test_status_and_its_cost(cable):
    loader.attach(SENSOR, DEFAULT)
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "bin" / "xdp-erm"), "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    interface, = json.loads(done.stdout)["interfaces"]
    assert interface["unseen"] == 0
