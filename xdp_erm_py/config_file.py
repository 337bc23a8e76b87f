"""Reads the configuration from the text of its file, see config.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from .config import Configuration, check_interface_name
from .errors import UsageError
from .printable import printable
from .settings import SETTINGS, InterfaceConfig, check


def parse(file: Path, text: str) -> Configuration:
    """What `text`, of `file`, configures. UsageError: file, line and value of the mistake in it."""
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
