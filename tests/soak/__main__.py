"""Exit status 1 where the books do not balance, something is left behind, or the publisher grows."""

from __future__ import annotations

import argparse
import random
import sys
import time

from soak.soak import show, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, metavar="NUMBER", help="default: %(default)g")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), metavar="NUMBER",
                        help="for the same faults in the same order (default: a new one)")
    arguments = parser.parse_args()
    print(f"--minutes {arguments.minutes:g} --seed {arguments.seed}", flush=True)
    started = time.monotonic()
    done = soak(arguments.minutes * 60, arguments.seed,
                lambda fault: print(f"{time.monotonic() - started:7.1f} s  {fault}", flush=True))
    show(done)
    return 1 if done.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
