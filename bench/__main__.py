"""What the XDP program costs: nanoseconds per packet over a program that does nothing, in interleaved rounds.

A harness around the program's own source writes each live frame's headers anew, calls the program and drops the frame,
so that nothing but the program is in the difference. The no-op differs in not calling it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import struct
from pathlib import Path

from xdp_erm_py import bpf, compiler, generate, shared
from xdp_erm_py.config import InterfaceConfig

HEADERS = 96  # bytes written anew: all that the program reads or changes
QUIET = {"sessions": False, "isolate": False, "vlan": "strip"}
HARNESS = """
struct headers {
	u64 words[%d];
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
	%s
	return XDP_DROP;
}
"""


def cases() -> dict[str, tuple[str, bytes, InterfaceConfig]]:
    """By name: the statement in the harness, the frame and the configuration."""
    call, strip, quiet = "xdp_erm(ctx);", "bpf_xdp_adjust_head(ctx, 54);", InterfaceConfig(**QUIET)
    frame = generate.layout_of(512, 2011, False).frame
    arp = frame[:12] + b"\x08\x06" + frame[14:]
    tcp = frame[:23] + b"\x06" + frame[24:]
    other = frame[:36] + b"\0\x35" + frame[38:]
    found = {
        "no-op": ("", frame, quiet),
        "bare 54-byte strip": (strip, frame, quiet),
        "strip": (call, frame, quiet),
        "strip + VLAN": (call, frame, InterfaceConfig(**{**QUIET, "vlan": "restore"})),
        "strip + VLAN + sessions": (call, frame, InterfaceConfig(isolate=False)),
        "as by default (and isolation)": (call, frame, InterfaceConfig()),
        "not ERM: ARP": (call, arp, quiet),
        "not ERM: TCP": (call, tcp, quiet),
        "not ERM: other UDP": (call, other, quiet),
    }
    for size in (64, 1514):
        found[f"strip, {size} bytes"] = (call, generate.layout_of(size, 2011, False).frame, quiet)
    found["strip, IPv6"] = (call, generate.layout_of(512, 2011, True).frame, quiet)
    return found


class Case:
    def __init__(self, statement: str, frame: bytes, config: InterfaceConfig) -> None:
        source = compiler.source(compiler.SOURCE).decode()
        source = source.replace(f"int {compiler.PROGRAM}(", f"static __always_inline int {compiler.PROGRAM}(")
        source += HARNESS % (HEADERS // 8, statement)
        self._module = compiler.module(source.encode(), compiler.flags(config))
        bpf.update(self._module[b"original"].map_fd, bytes(4), frame[:HEADERS])
        self._program = bpf.load_xdp("bench", *compiler.function(self._module, "bench"))
        self._frame = frame

    def nanoseconds(self, count: int) -> int:
        return bpf.run_live(self._program, self._frame, count)

    def counted(self, counter: str) -> int:
        """Packets that the program has counted so."""
        with bpf.Map(os.dup(self._module[b"counters"].map_fd)) as counters:
            values = counters.lookup(struct.pack("=I", shared.COUNTERS.index(counter))) or []
            return sum(int(struct.unpack_from("=Q", value)[0]) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="few packets: shows that it runs, no figures to keep")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rounds, count = (3, 20_000) if args.quick else (9, 500_000)
    made = {name: Case(*case) for name, case in cases().items()}
    measured: dict[str, list[int]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, case in made.items():
            measured[name].append(case.nanoseconds(count))
    over = {name: [value - noop for value, noop in zip(values, measured["no-op"])] for name, values in measured.items()}
    machine = f"{platform.machine()}, Linux {platform.release()}, {bpf.possible_cpus()} CPUs"
    print(f"{machine}; {rounds} rounds of {count} live frames")
    print(f"{'ns per packet':32}{'all':>8}{'over no-op':>12}{'spread':>20}")
    for name, values in measured.items():
        print(f"{name:32}{statistics.median(values):8.1f}{statistics.median(over[name]):12.1f}"
              f"{min(over[name]):10.1f} .. {max(over[name]):.1f}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "packets": count, "nanoseconds": measured}) + "\n")


if __name__ == "__main__":
    main()
