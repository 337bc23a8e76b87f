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
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from . import sudo
from .errors import UsageError
from .printable import printable
from .settings import SETTINGS, InterfaceConfig, check, contradictions

DEFAULT_PATH = Path("/etc/xdp-erm.yaml")
LONGEST_OWN_NAME, LONGEST_NAME = 15, 127  # of an interface, in bytes; the latter are alternative ones (uapi linux/if.h)


def check_interface_name(name: Any) -> str:
    """The name, if Linux would take it for an interface (1 to 127 bytes, no slash, colon or space)."""
    if not isinstance(name, str) or not 1 <= len(name.encode()) <= LONGEST_NAME or name in (".", "..") or \
            any(character in "/:\0" or character.isspace() for character in name):
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
    try:
        return _Reader(file).configuration(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UsageError(f"{where}: not YAML: {_problem(error)}") from None
    except RecursionError:
        raise UsageError(f"{file}: nested too deeply") from None


def _problem(error: yaml.YAMLError) -> str:
    """PyYAML's complaint without the lines it quotes."""
    return getattr(error, "problem", None) or str(error).splitlines()[0]


class _Reader:
    """Walks the YAML nodes rather than the loaded values: nodes know their line, and keep duplicate keys."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._constructor = yaml.SafeLoader("")
        self._places: dict[tuple[str | None, str], str] = {}

    def _error(self, node: yaml.Node, problem: object) -> UsageError:
        return UsageError(f"{self._file}:{node.start_mark.line + 1}: {problem}")

    def _value(self, node: yaml.Node) -> Any:
        for each in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            self._check_number(each)
        try:
            value = self._constructor.construct_object(node, deep=True)
            repr(value)  # messages quote it, and a number of thousands of digits has no text
            return value
        except yaml.YAMLError as error:
            raise self._error(node, _problem(error)) from None
        except (ValueError, LookupError, AttributeError) as error:  # PyYAML does not check texts like 2001-99-99
            raise self._error(node, f"not a value of its type: {error}") from None

    def _check_number(self, node: yaml.Node) -> None:
        """YAML 1.1 reads 22:22 as a number to the base of 60, 010 as an octal one: nobody means that here."""
        if node.tag == "tag:yaml.org,2002:int" and not re.fullmatch("-?(0|[1-9][0-9]*)", node.value):
            raise self._error(node, f"{printable(node.value)} is not a decimal number: write it as one")

    def _items(self, node: yaml.Node | None, what: str) -> list[tuple[yaml.Node, Any, yaml.Node]]:
        """(key's node, key, value's node) of a mapping; an empty one may be left blank."""
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return []
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what} must be a mapping, not {self._value(node)!r}")
        items: list[tuple[yaml.Node, Any, yaml.Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise self._error(key_node, "<< is not supported: what is for every interface goes under `defaults`")
            key = self._value(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, f"{key!r} is not a key")
            for earlier_node, earlier, _ in items:
                if earlier == key:
                    raise self._error(key_node, f"{key!r} stands twice, first in line "
                                                f"{earlier_node.start_mark.line + 1}")
            items.append((key_node, key, value_node))
        return items

    def _settings(self, node: yaml.Node, name: str | None) -> dict[str, Any]:
        """Those of one interface, or of None: for all."""
        settings = {}
        for key_node, key, value_node in self._items(node, name or "defaults"):
            self._places[name, key] = f"{self._file}:{value_node.start_mark.line + 1}"
            try:
                settings[key] = check(key, self._value(value_node))
            except ValueError as error:
                if key not in SETTINGS:
                    raise self._error(key_node, error) from None
                raise self._error(value_node, f"{key}: {error}") from None
        return settings

    def configuration(self, root: yaml.Node | None) -> Configuration:
        sections: dict[str, yaml.Node] = {}
        for key_node, key, value_node in self._items(root, "the configuration"):
            if key not in ("defaults", "interfaces"):
                raise self._error(key_node, f"unknown key {key!r} (known: defaults, interfaces)")
            sections[key] = value_node
        defaults = InterfaceConfig()
        if "defaults" in sections:
            defaults = InterfaceConfig(**self._settings(sections["defaults"], None))
        interfaces = {}
        for key_node, name, value_node in self._items(sections.get("interfaces"), "interfaces"):
            try:
                check_interface_name(name)
            except ValueError as error:
                raise self._error(key_node, error) from None
            interfaces[name] = dataclasses.replace(defaults, **self._settings(value_node, name))
        return Configuration(interfaces, defaults, self._places)
