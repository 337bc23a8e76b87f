"""Compares the XDP program with the reference on as many distinct frames as wanted, on each CPU at once.

Exit status 1 where they differ in one frame's bytes or counters, and where the frames did not reach every verdict but
`unmarked`, which needs a driver without metadata. A test run takes no frame below 14 bytes, and of
one longer than a page it shows the program about 3500 bytes: such frames, up to 9216 bytes, tell that the program keeps
to what it is shown and leaves the rest alone, not how it decapsulates jumbo frames.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import random
import sys
import time

from fuzz.differential import CASES, ENOUGH, Result, run
from xdp_erm_py import shared


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), metavar="NUMBER",
                        help="with the same --frames and --processes it gives the same frames (default: a new one)")
    parser.add_argument("--frames", type=int, default=2_000_000, metavar="NUMBER", help="default: %(default)d")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="NUMBER",
                        help="default: one for each CPU")
    arguments = parser.parse_args()
    if arguments.frames < 1 or arguments.processes < 1:
        parser.error("--frames and --processes must be 1 or more")
    print(f"--seed {arguments.seed} --frames {arguments.frames} --processes {arguments.processes}, "
          f"{len(CASES)} programs", flush=True)

    started = time.monotonic()
    total = Result()
    # Not forked: each process has a bcc of its own.
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        shares = [(number, arguments.processes) for number in range(arguments.processes)]
        seeds = [f"{arguments.seed}/{number}" for number, _ in shares]
        frames = [-(-arguments.frames // arguments.processes)] * len(shares)
        for result in pool.map(run, seeds, frames, shares):
            total.add(result)
    show(total, time.monotonic() - started)
    return 1 if total.mismatches or unreached(total) else 0


def unreached(result: Result) -> list[str]:
    """The verdicts and notes that no frame got, and the encapsulations that none came in."""
    encapsulations = {name for name, _ in result.encapsulations}
    return [*(name for name in shared.COUNTERS if not result.counted[name] and name != "unmarked"),
            *(name for name in shared.ENCAPSULATIONS if name not in encapsulations)]


def show(result: Result, seconds: float) -> None:
    print("\nframes by verdict and note")
    for name in shared.COUNTERS:
        print(f"{result.counted[name]:10}  {name}")
    print("\ndecapsulated frames by outermost encapsulation, and whether they are numbered")
    for (name, numbered), frames in sorted(result.encapsulations.items()):
        print(f"{frames:10}  {name}{', numbered' if numbered else ''}")
    print("\ndecapsulated frames by levels peeled, 802.1Q tag, bytes behind the datagram, and what was mirrored")
    kinds = sorted({kind for *_, kind in result.shapes})
    print("levels  tag       behind", *(f"{kind:>13}" for kind in kinds))
    for levels, tagged, cut in sorted({tuple(done) for *done, _ in result.shapes}):
        numbers = (f"{result.shapes[levels, tagged, cut, kind]:13}" for kind in kinds)
        print(f"{levels:6}  {'inserted' if tagged else 'none':8}  {'cut' if cut else 'none':6}", *numbers)
    print(f"\n{result.frames} distinct frames of {result.shortest} to {result.longest} bytes (decapsulated: up to "
          f"{result.longest_decapsulated}) in {seconds:.0f} s, {len(result.mismatches)} mismatches")
    for mismatch in result.mismatches[:ENOUGH]:
        print(f"MISMATCH {mismatch}")
    for name in unreached(result):
        print(f"NOT REACHED {name}")


if __name__ == "__main__":
    sys.exit(main())
