"""The table of settings against what follows it."""

from __future__ import annotations

from xdp_erm_py import settings
from xdp_erm_py.settings import DEFAULTS, SETTINGS, InterfaceConfig


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
