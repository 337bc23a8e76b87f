"""Runs frames through the XDP program and through an oracle, and tells where they differ."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator

from frames import ELSEWHERE, SENSOR
from program import XDP_PASS, Counted, Program, mark

from fuzz.generator import LONGEST, Generator
from xdp_erm_py import shared
from xdp_erm_py.interface.stats import Order
from xdp_erm_py.kernel import bpf
from xdp_erm_py.program import reference
from xdp_erm_py.program.compiler import PLAIN, Variant
from xdp_erm_py.program.encapsulations import Untouched
from xdp_erm_py.program.reference import Decapsulation, Session
from xdp_erm_py.settings import InterfaceConfig

ANYBODY = ("0.0.0.0/0",)
ALL = shared.ENCAPSULATIONS
ANYBODY_6 = (*ANYBODY, "::/0")
SOME_6 = ("198.51.100.0/24", "2001:db8::/33", "2001:db8:1::2/128")

#: Programs: the configuration, and what they depend on besides.
CASES = tuple((config, PLAIN) for config in (
    InterfaceConfig(),
    InterfaceConfig(isolate=False),
    InterfaceConfig(depth=3, sources=ANYBODY),
    InterfaceConfig(vlan="tagged", depth=2, port=(7932, 7933), sources=("198.51.100.0/24",)),
    InterfaceConfig(vlan="tagged", isolate=False, sessions=False),
    InterfaceConfig(vlan="strip", sources=("198.51.100.0/24", "10.0.0.0/8")),
    InterfaceConfig(vlan="strip", depth=3, port=(7932, 7933), sources=ANYBODY, sessions=False),
    InterfaceConfig(sessions=False, targets=(SENSOR,)),
    InterfaceConfig(depth=3, sources=("198.51.100.1/32", "203.0.113.0/24", *ELSEWHERE), targets=(SENSOR, *ELSEWHERE),
                    isolate=False),
)) + (
    (InterfaceConfig(), Variant(cpus=(0,))),
    (InterfaceConfig(vlan="strip", depth=3, sources=ANYBODY, isolate=False, spread_ports=True), Variant(cpus=(0, 0))),
    (InterfaceConfig(), Variant(frags=True)),
    (InterfaceConfig(vlan="tagged", depth=3, sources=ANYBODY, isolate=False), Variant(cpus=(0,), frags=True)),
    (InterfaceConfig(encapsulations=ALL, depth=3, sources=ANYBODY_6, spread_ports=True),
     Variant(cpus=(0,), frags=True)),
) + tuple((config, PLAIN) for config in (
    InterfaceConfig(encapsulations=ALL),
    InterfaceConfig(encapsulations=ALL, depth=3, sources=ANYBODY_6, vlan="tagged"),
    InterfaceConfig(encapsulations=ALL, depth=2, sources=SOME_6, targets=(SENSOR, "2001:db8::9"), isolate=False),
    InterfaceConfig(encapsulations=ALL, depth=3, sources=(*SOME_6, *ELSEWHERE),
                    targets=(SENSOR, "2001:db8::9", *ELSEWHERE), vlan="strip", sessions=False),
    InterfaceConfig(encapsulations=("erspan",), depth=3, sources=ANYBODY_6),
    InterfaceConfig(encapsulations=("gre",), vlan="strip"),
    InterfaceConfig(encapsulations=("vxlan", "geneve"), depth=2, sources=ANYBODY_6),
    InterfaceConfig(encapsulations=("erm", "tzsp"), depth=2, sources=ANYBODY),
))

# Reading the counters takes as long as running some frames.
BATCH = 64
# Mismatches after which a run is given up: more of them say no more.
ENOUGH = 5
# An LRU map is allowed to forget; with so few sessions it does not.
MOST_SESSIONS = shared.MAX_SESSIONS // 2

NOTHING = Counted(0, 0)

Oracle = Callable[[bytes, InterfaceConfig], Decapsulation]


@dataclasses.dataclass
class Result:
    """What a run saw."""

    frames: int = 0
    shortest: int = LONGEST
    longest: int = 0
    longest_decapsulated: int = 0
    counted: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Frames by verdict, and by note."""
    shapes: collections.Counter[Shape] = dataclasses.field(default_factory=collections.Counter)
    """Decapsulated frames by what was done to them, and what was mirrored."""
    encapsulations: collections.Counter[tuple[str, bool]] = dataclasses.field(default_factory=collections.Counter)
    """Decapsulated frames by the outermost encapsulation, and whether its frames were numbered."""
    mismatches: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Result) -> None:
        self.frames += other.frames
        self.shortest, self.longest = min(self.shortest, other.shortest), max(self.longest, other.longest)
        self.longest_decapsulated = max(self.longest_decapsulated, other.longest_decapsulated)
        self.counted += other.counted
        self.shapes += other.shapes
        self.encapsulations += other.encapsulations
        self.mismatches += other.mismatches


# Levels peeled; whether a tag was inserted; whether bytes behind the datagram were cut; what was mirrored.
Shape = tuple[int, bool, bool, str]


def run(seed: str, frames: int, share: tuple[int, int] = (0, 1), oracle: Oracle = reference.decapsulate,
        cases: Iterable[tuple[InterfaceConfig, Variant]] = CASES) -> Result:
    """Compares at least `frames` distinct frames. Shares (number, of how many) have no frame in common."""
    result = Result()
    with contextlib.ExitStack() as stack:
        subjects = [Subject(stack.enter_context(Program(config, variant=variant)), config, variant, oracle)
                    for config, variant in cases]
        seen: set[int] = set()
        only_erm = distinct(Generator(f"{seed}/erm", ("erm",)), share, seen)
        mixed = distinct(Generator(seed), share, seen)
        rounds = itertools.count()
        while result.frames < frames and len(result.mismatches) < ENOUGH:
            foreign = next(rounds) % 4 == 0  # what is not configured
            for subject in subjects:
                source = only_erm if subject.is_only_erm and not foreign else mixed
                subject.compare([next(source) for _ in range(BATCH)], result)
        for subject in subjects:
            subject.compare_sessions(result)
    return result


def distinct(generator: Generator, share: tuple[int, int], seen: set[int] | None = None) -> Iterator[bytes]:
    """The frames of one share, each once, and none that was `seen` before."""
    number, shares = share
    seen = set() if seen is None else seen
    while True:
        frame = generator.frame()
        digest = int.from_bytes(hashlib.blake2b(frame, digest_size=8).digest(), "big")
        if digest % shares == number and digest not in seen:
            seen.add(digest)
            yield frame


class Numbers:
    """How the frames of a session are numbered, as bpf/xdp_erm.c follows them."""

    def __init__(self) -> None:
        self._highest: int | None = None
        self._missing = self._known = self.late = 0
        self._frames_to_settle = 0

    @property
    def order(self) -> Order:
        return Order(max(self._known if self._frames_to_settle else self._missing, 0), self.late)

    def follow(self, number: int) -> None:
        if self._highest is None:
            self._highest = number
            return
        step = (number - self._highest + (1 << 31)) % (1 << 32) - (1 << 31)
        if abs(step) > shared.LEAP and not self._frames_to_settle:
            self._known, self._frames_to_settle = self._missing, shared.LEAP
        if step > shared.MOST_MISSING or step < -shared.LEAP:  # numbered anew, or by another
            self._highest, self._missing, self._frames_to_settle = number, self._known, shared.LEAP
        elif step > 0:
            self._highest = number
            self._missing += step - 1
        else:
            self._missing -= 1
            self.late += step < 0
        self._frames_to_settle = max(self._frames_to_settle - 1, 0)


class Subject:
    """One program, and what it has counted by now."""

    def __init__(self, program: Program, config: InterfaceConfig, variant: Variant, oracle: Oracle) -> None:
        self._program, self._config, self._variant, self._oracle = program, config, variant, oracle
        self.is_only_erm = config.encapsulations == ("erm",)
        self._stripped = dataclasses.replace(config, vlan="strip")
        # Asked of the kernel: how much of a long frame a program without multi-buffer support is shown, as it is on no
        # interface, and how much lies in the first piece with it. It is a page without what the kernel wants before and
        # behind.
        with Program(config) as plain:
            self._piece = plain.run(bytes(max(LONGEST, mmap.PAGESIZE))).counters["other"].bytes
        self._visible = LONGEST if variant.frags else self._piece
        self._counters = program.counters()
        self._sessions: dict[Session, Counted] = {}
        self._numbers: dict[Session, Numbers] = {}

    def compare(self, frames: Iterable[bytes], result: Result) -> None:
        """Runs frames one by one, then compares the counters; what differs is in `result`."""
        batch = []
        sessions = set()
        for frame in frames:
            frame, expected = self._expected(frame)
            session = expected.session if self._config.sessions else None
            if session:
                if session not in self._sessions and len(self._sessions) >= MOST_SESSIONS:
                    continue
                self._sessions[session] = self._one_more(self._sessions.get(session, NOTHING), frame)
                sessions.add(session)
                if expected.number is not None:
                    self._numbers.setdefault(session, Numbers()).follow(expected.number)
            for name in _counted(expected):
                self._counters[name] = self._one_more(self._counters[name], frame)
            returned, left = bpf.test_run(self._program.fd, frame)
            action = self._program.action if expected.verdict == "decapsulated" else XDP_PASS
            if returned != action or left != self._left(expected):
                result.mismatches.append(self._tell(frame, expected, f"returned {returned}, left {left.hex()}"))
            batch.append(frame)
            self._note(frame, expected, result)
        counted = self._program.sessions()
        if self._program.counters() != self._counters or \
                any(counted.get(session) != self._sessions[session] for session in sessions):
            result.mismatches.append(self._miscounted(batch))

    def compare_sessions(self, result: Result) -> None:
        """All of them, since the program may have made one that nobody expects."""
        if self._config.sessions and self._program.order() != (self._order if "numbers" in self._program.maps else {}):
            order = self._program.order()
            wrong = {session: (order.get(session), self._order.get(session)) for session in {*order, *self._order}
                     if order.get(session) != self._order.get(session)}
            result.mismatches.append(f"{self._config}, {self._variant}: gaps and reordered of sessions: {wrong}")
        if self._program.sessions() != self._sessions:
            sessions = _moved(self._sessions, self._program.sessions())
            result.mismatches.append(f"{self._config}, {self._variant}: sessions that no frame has: {sessions}")

    @property
    def _order(self) -> dict[Session, Order]:
        return {session: numbers.order for session, numbers in self._numbers.items()}

    def _one_more(self, counted: Counted, frame: bytes) -> Counted:
        return Counted(counted.packets + 1, counted.bytes + min(len(frame), self._visible))

    def _note(self, frame: bytes, expected: Decapsulation, result: Result) -> None:
        result.frames += 1
        result.shortest, result.longest = min(result.shortest, len(frame)), max(result.longest, len(frame))
        result.counted.update(_counted(expected))
        if expected.verdict == "decapsulated":
            result.encapsulations[expected.session.encapsulation, expected.number is not None] += 1
            result.longest_decapsulated = max(result.longest_decapsulated, len(frame))
            mirrored = self._oracle(frame, self._stripped).frame
            result.shapes[expected.levels, len(expected.frame) > len(mirrored), not frame.endswith(mirrored),
                          _kind(mirrored)] += 1

    def _expected(self, frame: bytes) -> tuple[bytes, Decapsulation]:
        """The frame, and what shall come of it. One longer than what the program is shown is left as it is."""
        if len(frame) <= self._visible:
            expected = self._oracle(frame, self._config)
            if expected.verdict == "decapsulated" and len(frame) > self._piece and self._is_cut(frame):
                expected = Decapsulation("failed", frame)  # a frame in several pieces is not cut
            return frame, expected
        expected = self._oracle(frame[:self._visible], self._config)
        if expected.verdict == "decapsulated":  # the program would cut what it is not shown
            return frame[:self._visible], expected
        return frame, dataclasses.replace(expected, frame=frame)

    def _is_cut(self, frame: bytes) -> bool:
        """Whether the last byte is no part of the mirrored frame."""
        changed = frame[:-1] + bytes([frame[-1] ^ 1])
        return self._oracle(changed, self._stripped).frame == self._oracle(frame, self._stripped).frame

    def _left(self, expected: Decapsulation) -> bytes:
        """What a test run gives back: the metadata with the frame."""
        marked = self._config.isolate and expected.verdict == "decapsulated"
        return mark(expected.frame) + expected.frame if marked else expected.frame

    def _miscounted(self, batch: list[bytes]) -> str:
        """Runs a batch once more, frame by frame, to name the one that is miscounted."""
        for frame in batch:
            _, expected = self._expected(frame)
            counted = self._one_more(NOTHING, frame)
            before = self._program.counters(), self._program.sessions()
            bpf.test_run(self._program.fd, frame)
            counters = _moved(before[0], self._program.counters())
            sessions = _moved(before[1], self._program.sessions())
            if counters != dict.fromkeys(_counted(expected), counted) or \
                    sessions != ({expected.session: counted} if expected.session and self._config.sessions else {}):
                told = self._tell(frame, expected, f"counted {counters}, {sessions}")
                break
        else:
            told = (f"{self._config}, {self._variant}: miscounted, but none alone: "
                    f"{' '.join(frame.hex() for frame in batch)}")
        self._counters, self._sessions = self._program.counters(), self._program.sessions()
        return told

    def _tell(self, frame: bytes, expected: Decapsulation, seen: str) -> str:
        return (f"{self._config}, {self._variant}\n  frame {frame.hex()}\n  expected {_counted(expected)}, "
                f"{expected.session}, left {self._left(expected).hex()}\n  {seen}")


def _counted(expected: Decapsulation) -> list[str]:
    notes = {"nested": expected.levels > 1, "nested_refused": expected.nested_refused,
             "inner_truncated": expected.inner_truncated}
    return [expected.verdict, *(name for name, noted in notes.items() if noted)]


def _moved(before: dict, after: dict) -> dict:
    moved = {}
    for name, counted in after.items():
        earlier = before.get(name, NOTHING)
        if counted != earlier:
            moved[name] = Counted(counted.packets - earlier.packets, counted.bytes - earlier.bytes)
    return moved


def _kind(mirrored: bytes) -> str:
    try:
        ethertype, offset = reference.skip_ethernet(mirrored)
    except Untouched:
        return "cut tags"
    kind = {0x0800: "IPv4", 0x86DD: "IPv6"}.get(ethertype, "other")
    return f"{kind}, tagged" if offset > reference.ETHERNET_LEN else kind
