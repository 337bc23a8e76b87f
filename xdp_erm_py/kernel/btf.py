"""The numbers of the kernel's functions that BPF programs may call, from its type information (uapi linux/btf.h)."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

_TYPES = Path("/sys/kernel/btf/vmlinux")
_HEADER = struct.Struct("=HBBIIIII")  # magic, version, flags, its length; where types are, how long, and the strings
_TYPE = struct.Struct("=III")  # its name, kind and number of members, size

_FUNCTION = 12
#: Bytes behind a type's head, by kind; and those for each of its members.
_MORE = {1: 4, 3: 12, 14: 4, 17: 4}
_MEMBER = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


@functools.cache
def function_id(name: str) -> int | None:
    """The number that a call of the kernel's function has in an instruction; None: this kernel has no such function.

    Reads some 100,000 types, which takes a tenth of a second.
    """
    try:
        data = _TYPES.read_bytes()
    except OSError:  # a kernel without CONFIG_DEBUG_INFO_BTF has no function to call either
        return None
    _, _, _, length, types, types_length, strings, _ = _HEADER.unpack_from(data)
    place, end = length + types, length + types + types_length
    wanted = data.find(b"\0%s\0" % name.encode(), length + strings) + 1 - length - strings
    number = 1
    while place < end and wanted > 0:
        name_at, information, _ = _TYPE.unpack_from(data, place)
        kind = information >> 24 & 31
        if kind == _FUNCTION and name_at == wanted:
            return number
        place += _TYPE.size + _MORE.get(kind, 0) + _MEMBER.get(kind, 0) * (information & 0xFFFF)
        number += 1
    return None
