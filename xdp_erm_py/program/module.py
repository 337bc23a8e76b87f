"""What the compiler makes of a C text, and its programs and maps in the kernel."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import shared
from ..kernel import bpf, btf

# BPF_JMP | BPF_CALL, and what the source register says of a function of the kernel's (uapi linux/bpf.h).
_CALL, _PSEUDO_KFUNC_CALL = 0x85, 2

#: The kernel's function that puts the beginning of a frame into its first piece (Linux 6.18).
PULL_DATA = "bpf_xdp_pull_data"
#: Such functions, which the compiler does not know, by what stands for them.
_KERNEL_FUNCTIONS = {shared.CALL_PULL_DATA: PULL_DATA}


class Function(NamedTuple):
    instructions: bytes
    maps: tuple[tuple[int, str], ...]
    """Which instructions load the address of which map."""


class Object(NamedTuple):
    """A compiled C text. Nothing of it is in the kernel."""

    license: str
    maps: dict[str, bpf.MapDefinition]
    functions: dict[str, Function]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Object:
        """From what JSON can hold."""
        maps = {name: bpf.MapDefinition(**definition) for name, definition in plain["maps"].items()}
        functions = {name: Function(bytes.fromhex(function["instructions"]),
                                    tuple((place, map_) for place, map_ in function["maps"]))
                     for name, function in plain["functions"].items()}
        return cls(plain["license"], maps, functions)


class Module:
    """An object with its maps, which are gone after the with block unless a program holds them.

    OSError: the kernel makes none of them.
    """

    def __init__(self, compiled: Object) -> None:
        self._object = compiled
        #: Descriptors by name.
        self.maps: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            for name, definition in compiled.maps.items():
                self.maps[name] = stack.enter_context(bpf.descriptor(bpf.create_map(name, definition)))
            self._stack = stack.pop_all()

    def __enter__(self) -> Module:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def load_xdp(self, name: str, frags: bool = False, cpumap: bool = False,
                 carried: Mapping[str, int] | None = None) -> int:
        """Loads a function as an XDP program, with the maps in `carried` in place of its own; returns its descriptor.

        OSError: the kernel refuses it. For `frags` and `cpumap` see bpf.load_xdp.
        """
        return bpf.load_xdp(name, self._instructions(name, carried or {}), self._object.license.encode(), frags, cpumap)

    def load_classifier(self, function: str, name: str, carried: Mapping[str, int] | None = None) -> int:
        """Loads a function for a traffic control filter, as load_xdp does, under `name`."""
        return bpf.load_classifier(name, self._instructions(function, carried or {}), self._object.license.encode())

    def _instructions(self, name: str, carried: Mapping[str, int]) -> bytes:
        function = self._object.functions[name]
        instructions = bytearray(function.instructions)
        for place, map_ in function.maps:
            struct.pack_into("=i", instructions, place * 8 + 4, carried.get(map_, self.maps[map_]))
        for place in range(0, len(instructions), 8):
            code, _, _, number = struct.unpack_from("=BBhi", instructions, place)
            if code == _CALL and number in _KERNEL_FUNCTIONS:
                function_id = btf.function_id(_KERNEL_FUNCTIONS[number])
                if function_id is None:
                    raise OSError(errno.ENOTSUP, f"this kernel has no {_KERNEL_FUNCTIONS[number]}")
                struct.pack_into("=BBhi", instructions, place, _CALL, _PSEUDO_KFUNC_CALL << 4, 0, function_id)
        return bytes(instructions)
