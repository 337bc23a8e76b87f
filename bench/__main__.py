"""`make bench`: what xdp-erm costs, what it gains, and what one would do without it, in one run and one table."""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

from xdp_erm_py.kernel import bpf, version
from xdp_erm_py.kernel.privileges import require_to_change

from . import alternatives, balance, cost, helper, load, plot, table, way, zeek

GROUPS = {"cost": cost.run, "way": way.run, "balance": balance.run, "alternatives": alternatives.run, "zeek": zeek.run,
          "helper": helper.run}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    linux = ".".join(map(str, version.running()))
    return f"{model}, {len(bpf.possible_cpus())} CPUs, {platform.machine()}, Linux {linux}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="few packets: shows that it runs, no figures to keep")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP",
                        help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the values of all rounds")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture (SVG)")
    args = parser.parse_args()
    require_to_change()
    start, busy = time.monotonic(), os.getloadavg()[0]
    with load.programs() as directory:
        rows = [row for name in args.only for row in GROUPS[name](directory, args.quick)]
    print(f"{machine()}; {time.monotonic() - start:.0f} s, load before {busy:.1f}"
          f"{'; quick: no figures to keep' if args.quick else ''}")
    print(table.text(rows))
    document = {"machine": machine(), "quick": args.quick, "load_before": busy, "rows": [row.as_dict() for row in rows]}
    if args.json:
        args.json.write_text(table.as_json(document))
    if args.plot:
        args.plot.write_text(plot.draw(document))


if __name__ == "__main__":
    main()
