"""`make nics`: a table of drivers and kernels, by what was checked of them. Exit status 1: a cell is wrong.

NICS="vmxnet3 igb" KERNELS=6.12 runs a part. What each guest said in full stands in .cache/nics/share-*/log.
"""

from __future__ import annotations

import argparse
import sys

from .host import NICS, RELEASES, run

#: What stands on NICs, beside these.
STACKED = ("bond", "vlan", "bridge-port")
CHECKS = ("attach", "exact", "counted", "hostile", "swap", "jumbo", "detach", "told")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make nics")
    parser.add_argument("--nics", nargs="*", choices=[*list(NICS)[1:], *STACKED], default=[*list(NICS)[1:], *STACKED])
    parser.add_argument("--kernels", nargs="*", choices=list(RELEASES), default=list(RELEASES))
    args = parser.parse_args()
    wrong = 0
    for kernel in args.kernels:
        found = run(kernel, args.nics)
        print(f"\n{found['system']}\n\n| NIC | {' | '.join(CHECKS)} |\n|{'---|' * (1 + len(CHECKS))}")
        for name in args.nics:
            cells = found["nics"].get(name, {})
            print(f"| {name} | {' | '.join(cells.get(check, 'WRONG: no answer') for check in CHECKS)} |", flush=True)
            wrong += sum("WRONG" in cells.get(check, "WRONG") for check in CHECKS)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
