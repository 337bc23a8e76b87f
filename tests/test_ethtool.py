"""Features of interfaces are what ethtool(8) says."""

from __future__ import annotations

import errno
import re
import subprocess

import pytest

from xdp_erm_py.kernel import ethtool
from xdp_erm_py.kernel.ethtool import Feature
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR


def said(name: str) -> dict[str, Feature]:
    done = subprocess.run(["ethtool", "-k", name], capture_output=True, text=True, timeout=60, check=True)
    return {feature: Feature(on == "on", not fixed)
            for feature, on, fixed in re.findall(r"^\t?([\w-]+): (on|off)( \[fixed\])?", done.stdout, re.MULTILINE)}


@pytest.mark.parametrize("name", [SENSOR, "lo"])
def test_reading(cable, name):
    found, expected = ethtool.features(name), said(name)
    common = found.keys() & expected.keys()  # the command has names of its own for some
    assert len(common) > 30
    assert {feature: found[feature] for feature in common} == {feature: expected[feature] for feature in common}


def test_queues(cable):
    for number in (1, 2):
        subprocess.run(["ethtool", "-L", SENSOR, "rx", str(number), "tx", "1"], check=False, timeout=60)
        assert ethtool.channels(SENSOR) == [number, 1, 0, 0]
    assert ethtool.channels("lo") is None


def test_setting(cable):
    before = said(SENSOR)
    for on in (True, False):
        ethtool.set_features(SENSOR, {"rx-gro-list": on, "rx-vlan-stag-hw-parse": not on})
        now = said(SENSOR)
        assert (now["rx-gro-list"].on, now["rx-vlan-stag-hw-parse"].on) == (on, not on)
    changed = {"rx-gro-list", "rx-vlan-stag-hw-parse"}
    assert {name: now[name] for name in now.keys() - changed} == {name: before[name] for name in now.keys() - changed}


def test_what_the_driver_does_not_let(cable):
    before = said(SENSOR)
    assert ethtool.features(SENSOR)["rx-lro"] == Feature(False, False)
    ethtool.set_features(SENSOR, {"rx-lro": True})
    assert said(SENSOR) == before


@pytest.mark.parametrize("name", ["none", "longer-than-any-interface", ""])
def test_no_such_interface(cable, name):
    for act in (ethtool.features, lambda name: ethtool.set_features(name, {})):
        with pytest.raises(OSError) as raised:
            act(name)
        assert raised.value.errno == errno.ENODEV
