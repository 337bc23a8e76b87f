"""Makes watch.svg, a screen of `xdp-erm stats --watch` with what the program counts in network namespaces (root): a
part of `make pictures`.
"""

from __future__ import annotations

import io
import itertools
import re
import sys
import time
from pathlib import Path

from rich.console import Console

from xdp_erm_py import display
from xdp_erm_py.interface import loader, stats
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, Cable
from xdp_erm_py.lab.traffic import SESSIONS, synthetic
from xdp_erm_py.settings import InterfaceConfig

PICTURE = Path(__file__).parent / "watch.svg"
# All of the lab's switches but the last are known, whose packets are foreign.
KNOWN = sorted({session.source for session in SESSIONS})[:-1]
CONFIG = InterfaceConfig(sources=tuple(f"{source}/32" for source in KNOWN))
PACKETS, SECONDS = 12_000, 2.0  # sent evenly, half of them before the first reading


def readings() -> tuple[list[dict], list[dict], float]:
    """Two readings and the seconds between them."""
    with Cable() as cable:
        with cable.sensor.entered():
            loader.attach(SENSOR_INTERFACE, CONFIG)
        cable.wait_for_carrier()
        packets = synthetic(2000, PACKETS)
        arp = b"\xff" * 6 + bytes.fromhex("020000000001 0806").ljust(54, b"\0")

        def send() -> float:
            start = time.monotonic()
            for number, packet in enumerate(itertools.islice(packets, PACKETS // 2)):
                cable.send(packet.sent)
                if number % 100 == 0:
                    cable.send(arp)
                    time.sleep(max(0.0, start + SECONDS * number / (PACKETS // 2) - time.monotonic()))
            return time.monotonic() - start

        def read() -> list[dict]:
            with cable.sensor.entered():
                return stats.snapshot(SENSOR_INTERFACE)

        send()
        before = read()
        seconds = send()
        return before, read(), seconds


def main() -> None:
    before, after, seconds = readings()
    console = Console(record=True, width=92, force_terminal=True, highlight=False, markup=False, emoji=False,
                      file=io.StringIO())
    console.print(display.rate_tables(after, {interface["ifindex"]: interface for interface in before}, seconds))
    svg = console.export_svg(title="xdp-erm stats --watch")
    # Fonts of another site are loaded nowhere.
    PICTURE.write_text(re.sub(r"@font-face \{[^}]*\}\s*", "", svg))
    print(f"wrote {PICTURE}", file=sys.stderr)


if __name__ == "__main__":
    main()
