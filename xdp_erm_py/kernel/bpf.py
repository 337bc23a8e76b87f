"""The bpf(2) system call, as far as it is needed: programs and maps by id, their contents, loading and test runs.

bcc has no call for most of this, and importing it makes a process 75 MB larger. Structures follow `union bpf_attr` of
the kernel's uapi linux/bpf.h; unless said otherwise every function raises OSError with the kernel's errno.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import XdpErmError

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD = 0, 1, 2, 5
_PROG_ATTACH, _PROG_DETACH, _PROG_QUERY = 8, 9, 16
_PROG_TEST_RUN, _PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 10, 13, 14, 15
_MAP_LOOKUP_BATCH, _PROG_BIND_MAP = 24, 35

_MAP_TYPE_ARRAY, _MAP_TYPE_PERCPU_ARRAY = 2, 6
_PROG_TYPE_SCHED_CLS, _PROG_TYPE_XDP = 3, 6
_XDP_HAS_FRAGS, _XDP_CPUMAP = 1 << 5, 35  # a flag, and a type of attachment
_TCX_INGRESS, _BEFORE = 46, 1 << 3  # the same, the other way round
_PERCPU_MAP_TYPES = (5, 6, 10)  # hash, array, LRU hash

_POSSIBLE = Path("/sys/devices/system/cpu/possible")

_libc = ctypes.CDLL(None, use_errno=True)


class ProgramInfo(NamedTuple):
    id: int
    name: str
    map_ids: tuple[int, ...]


class MapDefinition(NamedTuple):
    """What a map is made of."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class MapInfo(NamedTuple):
    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


def _bpf(command: int, attributes: bytes | ctypes.Array[ctypes.c_char]) -> int:
    if isinstance(attributes, bytes):
        attributes = ctypes.create_string_buffer(attributes, len(attributes))
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise XdpErmError(f"xdp-erm does not know the number of bpf(2) on {platform.machine()}, only on "
                          f"{', '.join(_SYSCALL)}")
    result: int = _libc.syscall(number, command, attributes, len(attributes))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def _name(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")


class Gone(FileNotFoundError):
    """There is no program, or no map, of this id any more."""


def possible_cpus() -> tuple[int, ...]:
    """The numbers of the CPUs that a per-CPU map holds a value for, in the order of these; there may be gaps.

    XdpErmError: /sys does not tell.
    """
    try:
        text = _POSSIBLE.read_text()
    except OSError as error:
        raise XdpErmError(f"{_POSSIBLE} cannot be read: {error.strerror}") from None
    runs = [run.split("-") for run in text.strip().split(",")]
    return tuple(cpu for run in runs for cpu in range(int(run[0]), int(run[-1]) + 1))


@contextlib.contextmanager
def descriptor(fd: int) -> Iterator[int]:
    """Closes `fd` after the with block."""
    try:
        yield fd
    finally:
        os.close(fd)


def program_fd(program_id: int) -> int:
    """A new descriptor of a loaded program. Gone: there is none of that id; XdpErmError: it is not shown here."""
    return _by_id(_PROG_GET_FD_BY_ID, program_id)


def _by_id(command: int, number: int) -> int:
    try:
        return _bpf(command, struct.pack("=III", number, 0, 0))
    except FileNotFoundError as error:
        raise Gone(*error.args) from None
    except PermissionError as error:
        raise XdpErmError(f"this kernel does not show which BPF programs are there: {error.strerror} (kernel lockdown, "
                          "or the root of a container who is not the host's: run it on the host)") from None


def _info(fd: int, info: ctypes.Array[ctypes.c_char]) -> None:
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), _address(info)))


def program_info(fd: int) -> ProgramInfo:
    """What the kernel knows of a program (struct bpf_prog_info)."""
    most = 64
    ids = (ctypes.c_uint32 * most)()
    info = ctypes.create_string_buffer(80)
    struct.pack_into("=IQ", info, 52, most, ctypes.addressof(ids))
    _info(fd, info)
    program_id, = struct.unpack_from("=I", info, 4)
    count, = struct.unpack_from("=I", info, 52)
    return ProgramInfo(program_id, _name(info.raw[64:80]), tuple(ids[:min(count, most)]))


class Map:
    """An open map; the with block closes it."""

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor `fd`."""
        self.fd = fd
        try:
            info = ctypes.create_string_buffer(40)
            _info(fd, info)
            kind, map_id, key_size, value_size, max_entries, flags = struct.unpack_from("=6I", info)
            self.info = MapInfo(kind, map_id, key_size, value_size, max_entries, flags, _name(info.raw[24:40]))
            self._stride = (value_size + 7) // 8 * 8
            self._copies = len(possible_cpus()) if kind in _PERCPU_MAP_TYPES else 1
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def by_id(cls, map_id: int) -> Map:
        """Opens a loaded map. Gone: there is none of that id; XdpErmError: it is not shown here."""
        return cls(_by_id(_MAP_GET_FD_BY_ID, map_id))

    @classmethod
    def create_array(cls, name: str, value_size: int) -> Map:
        """Makes an array map with one value of `value_size` bytes."""
        return cls(create_map(name, MapDefinition(_MAP_TYPE_ARRAY, 4, value_size, 1, 0)))

    @classmethod
    def create_percpu_array(cls, name: str, value_size: int) -> Map:
        """The same with a value for each CPU."""
        return cls(create_map(name, MapDefinition(_MAP_TYPE_PERCPU_ARRAY, 4, value_size, 1, 0)))

    def __enter__(self) -> Map:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def lookup(self, key: bytes) -> list[bytes] | None:
        """The value under `key`, one for each possible CPU in a per-CPU map; None where there is none."""
        key_buffer = ctypes.create_string_buffer(key, len(key))
        values = ctypes.create_string_buffer(self._stride * self._copies)
        try:
            _bpf(_MAP_LOOKUP, struct.pack("=IIQQQ", self.fd, 0, _address(key_buffer), _address(values), 0))
        except FileNotFoundError:
            return None
        raw = values.raw  # a copy each time
        return [raw[start:start + self.info.value_size] for start in range(0, len(raw), self._stride)]

    def update(self, key: bytes, value: bytes) -> None:
        """Puts `value` under `key`."""
        update(self.fd, key, value)

    def contents(self) -> dict[bytes, bytes]:
        """All keys and values of a hash map (no per-CPU map).

        What is there from beginning to end is in it, however many keys come and go meanwhile: it is read in batches of
        whole buckets (Linux 5.6), not from key to key.
        """
        most, key_size, value_size = self.info.max_entries, self.info.key_size, self.info.value_size
        keys, values = ctypes.create_string_buffer(most * key_size), ctypes.create_string_buffer(most * value_size)
        place = ctypes.create_string_buffer(4)
        found: dict[bytes, bytes] = {}
        before, at_end = 0, False
        while not at_end:
            attributes = ctypes.create_string_buffer(struct.pack(
                "=QQQQIIQQ", before, _address(place), _address(keys), _address(values), most, self.fd, 0, 0), 56)
            try:
                _bpf(_MAP_LOOKUP_BATCH, attributes)
            except FileNotFoundError:
                at_end = True
            count, = struct.unpack_from("=I", attributes, 32)
            raw_keys, raw_values = keys.raw, values.raw
            for index in range(count):
                key = raw_keys[index * key_size:(index + 1) * key_size]
                found[key] = raw_values[index * value_size:(index + 1) * value_size]
            before = _address(place)
        return found


def create_map(name: str, definition: MapDefinition) -> int:
    """Makes a map; returns its descriptor. The kernel keeps 15 bytes of the name."""
    return _bpf(_MAP_CREATE, struct.pack("=7I15sx", *definition, 0, 0, name.encode()))


def update(fd: int, key: bytes, value: bytes) -> None:
    """Puts `value` under `key` in the map with descriptor `fd` (no per-CPU map)."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    _bpf(_MAP_UPDATE, struct.pack("=IIQQQ", fd, 0, _address(key_buffer), _address(value_buffer), 0))


def load_xdp(name: str, instructions: bytes, license: bytes, frags: bool = False, cpumap: bool = False) -> int:
    """Loads an XDP program; returns its descriptor. The verifier's complaint is in the OSError's text.

    `frags`: it takes frames in several pieces of memory (Linux 5.18). `cpumap`: it is for a cpumap's CPUs (Linux 5.9),
    and then `frags` must be the same for the program that redirects to them.
    """
    return _load(_PROG_TYPE_XDP, name, instructions, license, _XDP_HAS_FRAGS if frags else 0,
                 _XDP_CPUMAP if cpumap else 0)


def load_classifier(name: str, instructions: bytes, license: bytes) -> int:
    """Loads a program for a traffic control filter, as load_xdp does."""
    return _load(_PROG_TYPE_SCHED_CLS, name, instructions, license)


def _load(kind: int, name: str, instructions: bytes, license: bytes, flags: int = 0, attach_type: int = 0) -> int:
    instructions_buffer = ctypes.create_string_buffer(instructions, len(instructions))
    license_buffer = ctypes.create_string_buffer(license)

    def load(log: ctypes.Array[ctypes.c_char] | None) -> int:
        return _bpf(_PROG_LOAD, struct.pack(
            "=IIQQIIQII16sII", kind, len(instructions) // 8, _address(instructions_buffer),
            _address(license_buffer), 1 if log else 0, len(log) if log else 0, _address(log) if log else 0,
            0, flags, name.encode(), 0, attach_type))

    try:
        return load(None)
    except PermissionError as error:
        log = ctypes.create_string_buffer(1 << 20)
        try:
            return load(log)
        except OSError:
            reason = _name(log.raw).strip().splitlines()
            raise OSError(error.errno, "; ".join([str(error.strerror), *reason[-3:]])) from None


def bind_map(program: int, map_: int) -> None:
    """Makes a map live as long as a program that does not itself use it (Linux 5.10)."""
    _bpf(_PROG_BIND_MAP, struct.pack("=III", program, map_, 0))


class Tcx(NamedTuple):
    """The programs that see an interface's incoming frames behind the packet taps, before its filters."""

    programs: tuple[int, ...]
    """Ids, in the order in which they run."""
    revision: int
    """Grows with each change."""


def tcx(ifindex: int) -> Tcx | None:
    """None: the kernel has no tcx (before Linux 6.6). ENODEV: no such interface."""
    most = 64  # so many programs are the kernel's own limit
    ids = (ctypes.c_uint32 * most)()
    attributes = ctypes.create_string_buffer(struct.pack(
        "=IIIIQIIQQQQ", ifindex, _TCX_INGRESS, 0, 0, ctypes.addressof(ids), most, 0, 0, 0, 0, 0), 64)
    try:
        _bpf(_PROG_QUERY, attributes)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    count, = struct.unpack_from("=I", attributes, 24)
    revision, = struct.unpack_from("=Q", attributes, 56)
    return Tcx(tuple(ids[:count]), revision)


def attach_tcx(ifindex: int, program: int, revision: int) -> None:
    """Has the program with descriptor `program` run before the interface's others; it stays when the descriptor is
    closed. ESTALE: they have changed since that revision."""
    _bpf(_PROG_ATTACH, struct.pack("=IIIIIIQ", ifindex, program, _TCX_INGRESS, _BEFORE, 0, 0, revision))


def detach_tcx(ifindex: int, program: int) -> None:
    """Takes the program with descriptor `program` off. ENOENT: it is not there."""
    _bpf(_PROG_DETACH, struct.pack("=IIIIIIQ", ifindex, program, _TCX_INGRESS, 0, 0, 0, 0))


def test_run(program: int, packet: bytes, repeat: int = 1, linear: int | None = None) -> tuple[int, bytes]:
    """Runs an XDP program on one packet (14 bytes or more): its return value, and the packet as it is afterwards.

    `repeat`: so many times, each on what the one before has left. `linear`: the first piece of memory has only so many
    bytes of it (Linux 6.18; EINVAL before that).
    """
    before = ctypes.create_string_buffer(packet, len(packet))
    after = ctypes.create_string_buffer(len(packet) + 256)
    context = b"" if linear is None else struct.pack("=6I", 0, linear, 0, 0, 0, 0)  # struct xdp_md
    context_buffer = ctypes.create_string_buffer(context, len(context)) if context else None
    attributes = ctypes.create_string_buffer(struct.pack(
        "=IIIIQQIIIIQQ", program, 0, len(packet), len(after), _address(before), _address(after), repeat, 0,
        len(context), 0, _address(context_buffer) if context_buffer else 0, 0), 80)
    _bpf(_PROG_TEST_RUN, attributes)
    result, _, size = struct.unpack_from("=III", attributes, 4)
    return result, after.raw[:size]


def run_live(program: int, packet: bytes, count: int) -> int:
    """Runs an XDP program on `count` frames that do what it says, a redirect for instance (Linux 5.18).

    Each starts with the length of `packet`, but with what the frame before it in the same memory has left in it.
    Returns the nanoseconds that one took, without the preparation.
    """
    live_frames = 1 << 1
    buffer = ctypes.create_string_buffer(packet, len(packet))
    attributes = ctypes.create_string_buffer(struct.pack(
        "=IIIIQQIIIIQQIIII", program, 0, len(packet), 0, _address(buffer), 0, count, 0, 0, 0, 0, 0, live_frames, 0, 0,
        0), 80)
    _bpf(_PROG_TEST_RUN, attributes)
    nanoseconds: int = struct.unpack_from("=I", attributes, 36)[0]
    return nanoseconds
