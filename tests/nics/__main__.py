"""`make nics`: a table of drivers and kernels, by what was checked of them. Exit status 1: a cell is wrong.

NICS="vmxnet3 igb" KERNELS=6.12 runs a part. What each guest said in full stands in .cache/nics/share-*/log.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys

from .host import NICS, RELEASES, prepare, run

#: What stands on NICs, beside these.
STACKED = ("bond", "bond-vmxnet3", "vlan", "bridge", "bridge-port")
CHECKS = ("attach", "exact", "counted", "hostile", "swap", "spread", "jumbo", "detach", "told")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make nics")
    parser.add_argument("--nics", nargs="*", choices=[*list(NICS)[1:], *STACKED], default=[*list(NICS)[1:], *STACKED])
    parser.add_argument("--kernels", nargs="*", choices=list(RELEASES), default=list(RELEASES))
    args = parser.parse_args()
    wrong = 0
    for kernel in args.kernels:  # in turn: the roots and disks are made for one after the other
        prepare(kernel)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # and all guests at once
        tables = list(pool.map(lambda kernel: run(kernel, args.nics), args.kernels))
    for found in tables:
        print(f"\n{found['system']}\n\n| NIC | {' | '.join(CHECKS)} |\n|{'---|' * (1 + len(CHECKS))}")
        for name in args.nics:
            cells = found["nics"].get(name, {})
            print(f"| {name} | {' | '.join(cells.get(check, 'WRONG: no answer') for check in CHECKS)} |", flush=True)
            wrong += sum("WRONG" in cells.get(check, "WRONG") for check in CHECKS)
        print(f"\nall encapsulations with every other setting: {found['everything']}", flush=True)
        wrong += "WRONG" in found["everything"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
