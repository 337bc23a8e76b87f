"""The table of settings against what follows it."""

from __future__ import annotations

import subprocess
import types
from typing import Any
from unittest import mock

import yaml
from machine import needs_zeek

from xdp_erm_py import settings
from xdp_erm_py.settings import DEFAULTS, SETTINGS, InterfaceConfig

TIMEOUT = 60  # seconds


def test_defaults_are_in_canonical_form():
    """An empty list stands for what has no value of its own, like the allow lists: it is never checked."""
    assert InterfaceConfig(**{name: settings.check(name, value) for name, value in DEFAULTS.items() if value != []}) \
        == InterfaceConfig()


def test_options_say_what_is_not_the_default():
    for name, setting in SETTINGS.items():
        assert (setting.metavar is None) == isinstance(DEFAULTS[name], bool), name
        assert setting.option.startswith("--no-") == (DEFAULTS[name] is True), name
        assert setting.many == isinstance(DEFAULTS[name], list), name
    assert len({setting.option for setting in SETTINGS.values()}) == len(SETTINGS)


# Of each setting one that is not the default.
TEXTS = ("gre", "strip", "native", "cpumap", "3", "7933 7934", "192.0.2.7, 192.0.2.8")


def checked(name: str, text: str) -> object:
    """What the setting is with this text in zeekctl.cfg; None: it cannot have it."""
    setting = SETTINGS[name]
    words = text.replace(",", " ").split() if setting.many else [text]
    values = [int(word) if word.isdecimal() else word for word in words]
    try:
        return settings.check(name, values if setting.many else values[0])
    except ValueError:
        return None


def arguments(plugin: Any, options: dict[str, Any], pin_cpus: Any) -> list[str]:
    """What the helper is told of the interface of a worker, by what zeekctl.cfg says."""
    node = types.SimpleNamespace(name="worker-1", type="worker", addr="127.0.0.1", host="localhost", pin_cpus=pin_cpus,
                                 interface="af_packet::eth1", lb_method="",
                                 **{f"xdp_erm_{name}": "" for name in plugin.nodeKeys()})
    with mock.patch.multiple(plugin, getOption=options.__getitem__, nodes=lambda: [node]):
        [capture] = plugin._captures()
        return capture.arguments


@needs_zeek
def test_zeekctl_has_each_and_tells_the_helper(zeekctl):
    plugin = zeekctl.XdpErm()
    options = {name: (kind, default) for name, kind, default, _ in plugin.options()}
    chosen, expected = {name: default for name, (_, default) in options.items()}, {}
    for name, setting in SETTINGS.items():
        if name == "spread_avoid":  # is pin_cpus
            expected[name] = (7,)
            assert name not in options
            continue
        assert name in plugin.nodeKeys()
        if setting.metavar is None:
            assert options[name] == ("bool", DEFAULTS[name])
            chosen[name] = expected[name] = not DEFAULTS[name]
        else:
            single = setting.number and not setting.many
            assert options[name] == (("int", 0) if single else ("string", ""))
            text = next(text for text in TEXTS if checked(name, text) is not None)
            chosen[name], expected[name] = int(text) if single else text, checked(name, text)
            assert expected[name] != getattr(InterfaceConfig(), name)
    command = [zeekctl.HELPER, "config", *arguments(plugin, chosen, pin_cpus=7), "--config=/dev/null", "--", "eth1"]
    shown = subprocess.run(command, check=True, timeout=TIMEOUT, text=True, stdout=subprocess.PIPE).stdout
    assert yaml.safe_load(shown)["interfaces"]["eth1"] == InterfaceConfig(**expected).as_dict()


@needs_zeek
def test_what_is_not_set_in_zeekctl_is_left_to_the_hosts(zeekctl):
    plugin = zeekctl.XdpErm()
    defaults = {name: default for name, _, default, _ in plugin.options()}
    assert arguments(plugin, defaults, pin_cpus="") == []
