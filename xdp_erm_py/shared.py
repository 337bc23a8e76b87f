"""The constants that the XDP program and Python share, read from where they are written: bpf/shared.h."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def _beside(name: str) -> Any:
    """A directory beside the package, in a checkout as in the .pyz."""
    directory = Path(__file__).parents[1] / name
    if directory.is_dir():
        return directory
    from importlib import resources  # takes its time
    return resources.files("xdp_erm_py").parent / name  # type: ignore[attr-defined]


BPF_DIRECTORY = _beside("bpf")

_header = (BPF_DIRECTORY / "shared.h").read_text()
_numbers = {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)$", _header, re.MULTILINE)}


def _meanings(prefix: str) -> dict[str, str]:
    """What the enumerators of one enum mean, by their names as _enumerators gives them."""
    return {name.lower(): meaning for name, meaning in
            re.findall(rf"^\t{prefix}_(\w+)(?: = \w+)?,\s*/\* (.*) \*/$", _header, re.MULTILINE)}


def _enumerators(prefix: str) -> tuple[str, ...]:
    """The enumerators of one enum in their order, lower case, without the prefix and the closing *_COUNT."""
    names = re.findall(rf"^\t{prefix}_(\w+)[, ]", _header, re.MULTILINE)
    return tuple(name.lower() for name in names if name != "COUNT")


ERM_DEFAULT_PORT = _numbers["ERM_DEFAULT_PORT"]
VXLAN_DEFAULT_PORT = _numbers["VXLAN_DEFAULT_PORT"]
GENEVE_DEFAULT_PORT = _numbers["GENEVE_DEFAULT_PORT"]
TZSP_DEFAULT_PORT = _numbers["TZSP_DEFAULT_PORT"]
LEAP = _numbers["LEAP"]
MAX_TZSP_FIELDS = _numbers["MAX_TZSP_FIELDS"]
MOST_MISSING = _numbers["MOST_MISSING"]
MAX_DEPTH = _numbers["MAX_DEPTH"]
MARK = _numbers["MARK"]
CALL_PULL_DATA = _numbers["CALL_PULL_DATA"]
MAX_SENDERS = _numbers["MAX_SENDERS"]
MAX_SESSIONS = _numbers["MAX_SESSIONS"]
OWN_JIFFIES = _numbers["OWN_JIFFIES"]
OWN_SESSIONS = _numbers["OWN_SESSIONS"]

#: The ways to treat the mirrored frame's VLAN, by their number in the program.
VLAN_MODES = {name[5:].lower(): number for name, number in _numbers.items() if name.startswith("VLAN_")}

#: In which mirrored frames can come, by their number in the program.
ENCAPSULATIONS = _enumerators("ENCAPSULATION")

#: One of these for each packet.
VERDICTS = _enumerators("VERDICT")

#: Counted beside the verdict `decapsulated`.
NOTES = _enumerators("NOTE")

#: The names of the counters by their index in the kernel's map.
COUNTERS = VERDICTS + NOTES
MEANINGS = {**_meanings("VERDICT"), **_meanings("NOTE")}
