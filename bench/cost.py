"""What the XDP program costs a packet, over a program that does nothing, in interleaved rounds.

A harness around the program's own source writes each live frame's headers anew, calls the program and drops the frame,
so that nothing but the program is in the difference. The no-op differs in not calling it. To compare with, the same
frames go all the way to an AF_PACKET member's ring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute

from xdp_erm_py import shared
from xdp_erm_py.interface import isolation
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab import generate
from xdp_erm_py.lab.namespace import Namespace
from xdp_erm_py.lab.traffic import encapsulate
from xdp_erm_py.program import compiler
from xdp_erm_py.program.module import Function, Module
from xdp_erm_py.settings import InterfaceConfig

from . import bare
from .load import Members
from .table import Row

GROUP = "XDP program"
HEADERS = 96  # bytes written anew, in whole words: all that the program reads or changes
NESTED_HEADERS = 208  # two more wrappings
NO_OP, NESTED_NO_OP, DEFAULT, ON_THE_WAY = "no-op", "no-op for nested", "as by default (and isolation)", "the whole way"
HARNESS = """
struct headers {
	u64 words[%(words)d];
};
BPF_ARRAY(original, struct headers, 1);
int bench(struct xdp_md *ctx)
{
	struct headers *data = (void *)(long)ctx->data;
	u32 zero = 0;
	struct headers *headers = original.lookup(&zero);

	if (!headers || (void *)(data + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	/* In words: a processor stalls where bytes just written one by one are read together. */
	*data = *headers;
	%(statement)s
	return %(end)s;
}
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run on what, and what it must count for each packet."""

    statement: str
    frame: bytes
    config: InterfaceConfig
    counters: tuple[str, ...] = ("decapsulated",)
    headers: int = HEADERS
    end: str = "XDP_DROP"
    variant: compiler.Variant = compiler.PLAIN


def cases() -> dict[str, Case]:
    quiet = InterfaceConfig(sessions=False, isolate=False, vlan="strip")
    restore = dataclasses.replace(quiet, vlan="restore")
    call = "xdp_erm(ctx);"
    layout = generate.layout_of(512, 2011, False)
    frame, mirrored = layout.frame, layout.frame[generate.MIRRORED:]

    def changed(at: int, value: bytes) -> bytes:
        return frame[:at] + value + frame[at + len(value):]

    def size(length: int) -> bytes:
        return generate.layout_of(length, 2011, False).frame

    nested, deep = frame, dataclasses.replace(quiet, depth=3, sources=("198.51.100.0/24",))
    found = {
        NO_OP: Case("", frame, quiet, ()),
        "54 bytes taken off without a look": Case("bpf_xdp_adjust_head(ctx, 54);", frame, quiet, ()),
        "bare strip": Case(bare.STATEMENT, frame, quiet, ()),
        "strip": Case(call, frame, quiet),
        "strip + VLAN": Case(call, frame, restore),
        "strip + isolation": Case(call, frame, dataclasses.replace(quiet, isolate=True)),
        "strip + sessions": Case(call, frame, dataclasses.replace(quiet, sessions=True)),
        "strip + sources": Case(call, frame, dataclasses.replace(quiet, sources=("198.51.100.0/24",))),
        "strip + 64 sources": Case(call, frame, dataclasses.replace(
            quiet, sources=tuple(f"198.51.{number}.0/24" for number in range(64, 128)))),
        "strip + targets": Case(call, frame, dataclasses.replace(quiet, targets=("192.0.2.1",))),
        "strip + cpumap": Case(call, frame, quiet, variant=compiler.Variant(cpus=(0,))),
        "strip + frames in pieces": Case(call, frame, quiet, variant=compiler.Variant(frags=True)),
        "strip + VLAN + sessions": Case(call, frame, dataclasses.replace(restore, sessions=True)),
        DEFAULT: Case(call, frame, InterfaceConfig()),
        "strip, 64 bytes": Case(call, size(64), quiet),
        "strip, 1514 bytes": Case(call, size(1514), quiet),
        "strip, IPv6": Case(call, generate.layout_of(512, 2011, True).frame, quiet),
        "strip, cut by the session": Case(call, encapsulate(mirrored[:200], 2011, True, generate.SWITCH), quiet,
                                          ("decapsulated", "inner_truncated")),
        "other: ARP": Case(call, changed(12, b"\x08\x06"), quiet, ("other",)),
        "other: TCP": Case(call, changed(23, b"\x06"), quiet, ("other",)),
        "other: UDP": Case(call, changed(36, b"\0\x35"), quiet, ("other",)),
        "fragment": Case(call, changed(20, b"\x20\0"), quiet, ("fragment",)),
        "truncated": Case(call, frame[:-10], quiet, ("truncated",)),
        "malformed": Case(call, changed(38, b"\0\x07"), quiet, ("malformed",)),
        "foreign source": Case(call, frame, dataclasses.replace(quiet, sources=("203.0.113.0/24",)),
                               ("foreign_source",)),
        "foreign target": Case(call, frame, dataclasses.replace(quiet, targets=("203.0.113.1",)), ("foreign_target",)),
        NESTED_NO_OP: Case("", frame, quiet, (), NESTED_HEADERS),
    }
    for name in shared.ENCAPSULATIONS:
        of_it = dataclasses.replace(restore, encapsulations=(name,), sessions=True)
        found[f"{name} + sessions"] = Case(call, generate.layout_of(512, 2011, False, name).frame, of_it)
    found["erm, all taken + sessions"] = Case(call, frame, dataclasses.replace(
        restore, encapsulations=shared.ENCAPSULATIONS, sessions=True))
    for levels in (2, 3):
        nested = encapsulate(nested, 2011, True, generate.SWITCH)
        found[f"nested, {levels} levels"] = Case(call, nested, deep, ("decapsulated", "nested"), NESTED_HEADERS)
    found[ON_THE_WAY] = Case(call, frame, InterfaceConfig(), end="XDP_PASS")
    return found


class Loaded:
    """A case in the kernel."""

    def __init__(self, case: Case) -> None:
        source = compiler.source(compiler.SOURCE)
        source = source.replace(f"int {compiler.PROGRAM}(", f"static __always_inline int {compiler.PROGRAM}(")
        source += HARNESS % {"words": case.headers // 8, "statement": case.statement, "end": case.end}
        compiled = compiler.compiled(source, compiler.flags(case.config, case.variant))
        self._module = Module(compiled)
        compiler.fill(self._module, case.config, case.variant)
        for cpu in case.variant.cpus:
            # A queue without a program. Nothing comes into it: the harness drops what has been handed over.
            bpf.update(self._module.maps["cpus"], struct.pack("=I", cpu), struct.pack("=Ii", 64, 0))
        bpf.update(self._module.maps["original"], bytes(4), case.frame[:case.headers])
        self.program = self._module.load_xdp("bench", case.variant.frags)
        #: How many instructions there are, and how many calls of helpers, map look-ups that newer kernels put in their
        #: place included.
        self.instructions, self.calls = _size(compiled.functions["bench"])
        self._frame = case.frame

    def close(self) -> None:
        os.close(self.program)
        self._module.__exit__()

    def nanoseconds(self, count: int) -> int:
        return bpf.run_live(self.program, self._frame, count)

    def counted(self) -> dict[str, int]:
        """Packets by counter, without those that are zero."""
        found = {}
        with bpf.Map(os.dup(self._module.maps["counters"])) as counters:
            for index, name in enumerate(shared.COUNTERS):
                values = counters.lookup(struct.pack("=I", index)) or []
                found[name] = sum(int(struct.unpack_from("=Q", value)[0]) for value in values)
        return {name: packets for name, packets in found.items() if packets}


def _size(function: Function) -> tuple[int, int]:
    """Instructions, and calls of helpers among them (BPF_JMP | BPF_CALL, from no register)."""
    calls = sum(function.instructions[place:place + 2] == b"\x85\0"
                for place in range(0, len(function.instructions), 8))
    return len(function.instructions) // 8, calls


@contextlib.contextmanager
def loaded(case: Case) -> Iterator[Loaded]:
    with contextlib.closing(Loaded(case)) as made:
        yield made


@contextlib.contextmanager
def receiver(directory: Path) -> Iterator[Members]:
    """A member on the loopback interface of a namespace that the block is in: there passed live frames come in."""
    with contextlib.ExitStack() as stack:
        namespace = Namespace()
        stack.callback(namespace.close)
        stack.enter_context(namespace.entered())
        with IPRoute() as route:
            route.link("set", index=1, state="up")
        with Links() as links, isolation.counting({}) as taken:
            isolation.isolate(links.find("lo"), None, taken, lambda _: None)
        yield stack.enter_context(Members(directory, "lo", 1))


def run(directory: Path, quick: bool) -> list[Row]:
    rounds, count = (2, 20_000) if quick else (25, 400_000)
    measured: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        made = {name: stack.enter_context(loaded(case)) for name, case in cases().items()}
        sizes = {name: (case.instructions, case.calls) for name, case in made.items()}
        for _ in range(rounds):
            for name, case in made.items():
                with receiver(directory) if name == ON_THE_WAY else contextlib.nullcontext():
                    measured.setdefault(name, []).append(case.nanoseconds(count))
    rows = []
    for name, values in measured.items():
        if name in (NO_OP, NESTED_NO_OP):
            rows.append(Row(GROUP, name, "ns", values, "a live frame that is dropped"))
        elif name == ON_THE_WAY:
            rows.append(Row(GROUP, f"{name} to a member's ring", "ns", values, "as by default, no driver's work"))
        else:
            noop = measured[NO_OP if cases()[name].headers == HEADERS else NESTED_NO_OP]
            more, calls = (now - then for now, then in zip(sizes[name], sizes[NO_OP]))
            rows.append(Row(GROUP, name, "ns over no-op", [value - least for value, least in zip(values, noop)],
                            f"{more} instructions, {calls} calls"))
    default = next(row for row in rows if row.name == DEFAULT)
    share = [100 * cost / way for cost, way in zip(default.values, measured[ON_THE_WAY])]
    rows.append(Row(GROUP, "the program's share of the way", "%", share))
    return rows
