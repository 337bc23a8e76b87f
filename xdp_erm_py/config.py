"""What is configured: built-in defaults, /etc/xdp-erm.yaml over them, the command line over both.

    defaults:                 # for every interface
      vlan: restore
    interfaces:
      eth1:
        port: [7932, 7933]
      eth2: {sources: [192.0.2.0/24], set_mtu: true}

Every mistake is a UsageError that names file, line and value; nothing is used of a file that has one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import sudo
from .errors import UsageError
from .settings import SETTINGS, InterfaceConfig, contradictions

DEFAULT_PATH = Path("/etc/xdp-erm.yaml")
LONGEST_OWN_NAME, LONGEST_NAME = 15, 127  # of an interface, in bytes; the latter are alternative ones (uapi linux/if.h)


def check_interface_name(name: Any) -> str:
    """The name, if Linux would take it for an interface (1 to 127 bytes, no slash, colon or space) and it is UTF-8."""
    if not isinstance(name, str) or not 1 <= len(name.encode(errors="replace")) <= LONGEST_NAME or \
            name in (".", "..") or \
            any(character in "/:\0" or character.isspace() or "\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{name!r} is not an interface name")
    return name


def check_interface_names(names: Iterable[str]) -> list[str]:
    """The names, each once. UsageError: Linux would not take one for an interface."""
    try:
        return [check_interface_name(name) for name in dict.fromkeys(names)]
    except ValueError as error:
        raise UsageError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One configuration file: the settings by interface, and those for interfaces it does not name."""

    interfaces: dict[str, InterfaceConfig] = dataclasses.field(default_factory=dict)
    defaults: InterfaceConfig = dataclasses.field(default_factory=InterfaceConfig)
    places: dict[tuple[str | None, str], str] = dataclasses.field(default_factory=dict)
    """Where the file has a setting: FILE:LINE by interface (None: for all) and name."""

    def of(self, names: tuple[str, ...], overrides: dict[str, Any]) -> InterfaceConfig:
        """The settings of the interface that goes by these names, with the command line's (canonical) over them.

        UsageError: it stands there under two of them; settings contradict each other.
        """
        found = [name for name in names if name in self.interfaces]
        if len(found) > 1:
            raise UsageError(f"interfaces: {' and '.join(found)} are names of one interface: keep one of them")
        named = found[0] if found else None
        settings = dataclasses.replace(self.interfaces[named] if named else self.defaults, **overrides)
        for keys, problem in contradictions(settings):
            raise UsageError(f"{next(filter(None, (self._place(named, key, overrides) for key in keys)))}: {problem}")
        return settings

    def _place(self, named: str | None, key: str, overrides: dict[str, Any]) -> str | None:
        """Where a setting was made; None: nowhere, it is as built in."""
        if key in overrides:
            return f"argument {SETTINGS[key].option}"
        place = self.places.get((named, key), self.places.get((None, key)))
        return place and f"{place}: {key}"


def load(path: Path | None = None) -> Configuration:
    """Reads a configuration file; without a path the default one, which may be missing."""
    file = path or DEFAULT_PATH
    try:
        with sudo.rights_of_caller() if path else contextlib.nullcontext():
            text = file.read_text(encoding="utf-8-sig")  # as some editors begin a file
    except FileNotFoundError:
        if path is None:
            return Configuration()
        raise UsageError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None
    from . import config_file  # where there is none, an attach need not wait for PyYAML
    return config_file.parse(file, text)
