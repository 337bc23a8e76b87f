"""Makes the documentation's drawn pictures, for light and dark pages: a part of `make pictures`.

architecture.svg is drawn here; balance.svg shows what stands in lab.txt, the output of
`xdp-erm lab --sessions 1 --packets 4000`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
WIDTH = 800

LIGHT = {"page": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "line": "#818b98", "box": "#f6f8fa",
         "ours": "#ddf4ff", "edge": "#0969da", "good": "#1a7f37", "bad": "#bc4c00"}
DARK = {"page": "#0d1117", "ink": "#e6edf3", "soft": "#9198a1", "line": "#656c76", "box": "#151b23",
        "ours": "#0c2d6b", "edge": "#58a6ff", "good": "#3fb950", "bad": "#f0883e"}


def _colours(colours: dict[str, str]) -> str:
    fills = "".join(f".{name}{{fill:{colour}}}" for name, colour in colours.items())
    return fills + "".join((
        f".box{{stroke:{colours['line']}}}", f".ours{{stroke:{colours['edge']}}}",
        f".arrow{{stroke:{colours['line']};fill:none}}", f".head{{fill:{colours['line']}}}",
        f".outer{{fill:{colours['box']};stroke:{colours['bad']}}}",
        f".inner{{fill:{colours['box']};stroke:{colours['good']}}}"))


STYLE = ("text{font:14px 'DejaVu Sans',Verdana,sans-serif}.title{font-size:15px;font-weight:bold}"
         ".mono{font-family:'DejaVu Sans Mono',Menlo,monospace;font-size:13px}.small{font-size:13px}"
         f"{_colours(LIGHT)}@media (prefers-color-scheme:dark){{{_colours(DARK)}}}")


def picture(height: int, description: str, *parts: str) -> str:
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{escape(description)}</title>', f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>', *parts, "</svg>\n"))


def text(x: float, y: float, words: str, style: str = "ink", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'


def box(x: float, y: float, width: float, height: float, title: str, *lines: str, ours: bool = False) -> str:
    """A title and lines below it, in the middle of a box; `ours`: it is a part of xdp-erm."""
    top = y + height / 2 - 9 * len(lines) + 5
    return "\n".join((
        rectangle(x, y, width, height, "ours" if ours else "box"),
        text(x + width / 2, top, title, "ink title", "middle"),
        *(text(x + width / 2, top + 19 * number, line, "ink small", "middle")
          for number, line in enumerate(lines, 1))))


def arrow(*points: tuple[float, float]) -> str:
    """Along the points, with its head at the last, to which it goes straight."""
    (before_x, before_y), (x, y) = points[-2:]
    right, down = (x > before_x) - (x < before_x), (y > before_y) - (y < before_y)
    back_x, back_y = x - 8 * right, y - 8 * down
    path = " ".join(f"{a:g},{b:g}" for a, b in (*points[:-1], (back_x, back_y)))
    head = f"{x:g},{y:g} {back_x - 5 * down:g},{back_y - 5 * right:g} {back_x + 5 * down:g},{back_y + 5 * right:g}"
    return f'<polyline class="arrow" stroke-width="1.5" points="{path}"/><polygon class="head" points="{head}"/>'


def frame(x: float, y: float, *parts: tuple[str, int, bool]) -> str:
    """A frame on the wire: (what, how wide, whether it belongs to the wrapping)."""
    drawn = []
    for what, width, outer in parts:
        drawn += [rectangle(x, y, width, 24, "outer" if outer else "inner"),
                  text(x + width / 2, y + 17, what, "ink small", "middle")]
        x += width
    return "\n".join(drawn)


def architecture() -> str:
    workers = range(4)
    return picture(
        436, "A packet's way from the switch through XDP and AF_PACKET's fanout to Zeek's workers, and a counter's way "
        "from the XDP program's maps to xdp-erm stats and xdp_erm.log",
        text(20, 30, "A packet's way", "soft title"),
        frame(20, 46, ("Ethernet", 68, True), ("IP", 26, True), ("UDP", 38, True), ("ERM", 38, True),
              ("mirrored", 70, False)),
        frame(492, 46, ("802.1Q", 60, False), ("mirrored", 84, False)),
        box(20, 88, 92, 92, "switch", "mirrors", "its ports"),
        arrow((112, 134), (144, 134)),
        box(144, 88, 92, 92, "NIC", "one session,", "one queue"),
        arrow((236, 134), (268, 134)),
        box(268, 88, 192, 92, "xdp_erm.c", "in XDP: takes the wrapping", "off, puts the VLAN back,", "marks, counts",
            ours=True),
        arrow((460, 134), (492, 134)),
        box(492, 88, 144, 92, "packet taps", "AF_PACKET's fanout,", "by the inner flow"),
        *(arrow((636, 134), (652, 134), (652, 99 + 23.5 * number), (680, 99 + 23.5 * number)) for number in workers),
        *(rectangle(680, 88 + 23.5 * number, 100, 21, "box") + text(730, 103 + 23.5 * number, f"Zeek {number + 1}",
                                                                   "ink small", "middle") for number in workers),
        arrow((564, 180), (564, 214)),
        box(492, 214, 144, 66, "isolate.c", "in tcx: stops what", "has the mark", ours=True),
        arrow((636, 247), (680, 247)),
        box(680, 214, 100, 66, "the host", "its own", "traffic only"),
        text(20, 316, "A counter's way", "soft title"),
        arrow((364, 180), (364, 332)),
        text(354, 236, "each packet: one verdict, once counted", "soft small", "end"),
        box(268, 332, 192, 84, "maps", "verdicts per CPU,", "sessions, senders", ours=True),
        arrow((268, 374), (236, 374)),
        box(20, 332, 216, 84, "xdp-erm", "stats, status, doctor:", "find them by the interface", ours=True),
        arrow((460, 374), (492, 374)),
        box(492, 332, 144, 84, "publish", "differences, each", "exactly once", ours=True),
        arrow((636, 374), (680, 374)),
        box(680, 332, 100, 84, "Zeek", "xdp_erm.log,", "notices,", "metrics"))


class Worker(NamedTuple):
    """What one AF_PACKET fanout member got, in packets."""

    without: int
    with_xdp_erm: int


def read_lab(output: str) -> list[Worker]:
    rows = re.findall(r"^worker \d+ .*?% +(\d+) +\d+ .*?% +(\d+) +\d+$", output, re.MULTILINE)
    return [Worker(int(without), int(with_xdp_erm)) for without, with_xdp_erm in rows]


def balance(workers: list[Worker]) -> str:
    most = max(sum(column) for column in zip(*workers))
    parts = []
    for x, title, style, column in ((24, "without xdp-erm", "bad", 0), (424, "with xdp-erm", "good", 1)):
        parts.append(text(x, 66, title, "ink title"))
        for number, worker in enumerate(workers):
            y, packets = 84 + 38 * number, worker[column]
            length = 190 * packets / most
            parts += [text(x, y + 18, f"worker {number + 1}", "ink small"), rectangle(x + 76, y, 190, 26, "box"),
                      rectangle(x + 76, y, length, 26, style) if packets else "",
                      text(x + 346, y + 18, f"{packets:,}", "ink mono", "end")]
    return picture(
        96 + 38 * len(workers), f"{most:,} packets over {len(workers)} workers, without and with xdp-erm",
        text(24, 32, f"{most:,} packets of 2,000 flows in one mirror session, over {len(workers)} AF_PACKET workers",
             "soft"), *parts)


def main() -> None:
    drawn = {"architecture.svg": architecture(), "balance.svg": balance(read_lab((HERE / "lab.txt").read_text()))}
    for name, svg in drawn.items():
        (HERE / name).write_text(svg)
        print(f"wrote {HERE / name}", file=sys.stderr)


if __name__ == "__main__":
    main()
