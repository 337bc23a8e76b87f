"""Draws what a packet costs and how many reach the members, for light and dark pages.

    python3 -m bench.plot FILE PICTURE     draws what `make bench BENCH="--json FILE"` wrote
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from docs.pictures import picture, rectangle, text

from . import balance, cost
from .table import Row

STEP = 19  # from bar to bar
CASE = re.compile(rf"(.+), ({'|'.join(map(re.escape, balance.DEMANDS))}), (\d+) members?")
STYLES = {"no XDP": "bad", "bare strip": "line", "54 bytes taken off without a look": "line"}
"""Of what is not ours."""


def is_drawn(row: Row) -> bool:
    """Or of a case that is, as are packets per CPU."""
    return row.unit == "ns over no-op" or bool(CASE.match(row.name))


def draw(document: dict[str, Any]) -> str:
    """An SVG of what is written as JSON; a part is left out where its group was not run."""
    rows = [row for row in map(Row.of, document["rows"]) if is_drawn(row)]
    parts, bottom = _cost([row for row in rows if row.group == cost.GROUP], 62)
    more, bottom = _balance([row for row in rows if row.group == balance.GROUP], bottom)
    said = f"{document['machine']}; load before: {document['load_before']:.1f}"
    return picture(bottom + 20, "What the XDP program costs a packet, and how many packets reach AF_PACKET members",
                   text(20, 28, said, "soft small"), *parts, *more)


def _cost(rows: list[Row], y: int) -> tuple[list[str], int]:
    """What is drawn from there on, and where it ends."""
    if not rows:
        return [], y
    parts = [text(20, y, "What the XDP program costs a packet", "ink title"),
             text(780, y, "ns over a program that does nothing", "soft small", "end")]
    y += 6
    for row in rows:
        y += STEP
        parts += [text(280, y, row.name, "ink small", "end"),
                  *_bar(row, 292, y, 430, _range(rows), STYLES.get(row.name, "good"), f"{row.median:.0f}")]
    return parts, y


def _balance(rows: list[Row], y: int) -> tuple[list[str], int]:
    """A line for each number of members and arrangement, a column for each thing that members do."""
    found = {case.groups(): row for row in rows if (case := CASE.fullmatch(row.name))}
    if not found:
        return [], y
    y += 2 * STEP
    demands, members, arrangements = ({case[place]: None for case in found} for place in (1, 2, 0))
    parts = [text(20, y, "Packets that reach AF_PACKET members", "ink title"),
             text(780, y, "thousands a second", "soft small", "end")]
    y += STEP
    parts += [text(202 + 300 * number, y, demand, "soft small") for number, demand in enumerate(demands)]
    for count in members:
        y += STEP + 8
        parts.append(text(20, y, f"{count} member{'s' if count != '1' else ''}", "ink title"))
        for arrangement in arrangements:
            y += STEP
            parts.append(text(190, y, arrangement, "ink small", "end"))
            for number, demand in enumerate(demands):
                row = found[arrangement, demand, count]
                scale = _range([row for case, row in found.items() if case[1] == demand])
                parts += _bar(row, 202 + 300 * number, y, 210, scale, STYLES.get(arrangement, "good"),
                              f"{row.median / 1000:,.0f}")
    return parts, y


def _bar(row: Row, x: float, y: float, width: float, within: tuple[float, float], style: str, number: str) -> list[str]:
    """The median, as a bar, and from the smallest to the largest value a line; behind it the number."""
    least, most = within

    def at(value: float) -> float:
        return x + width * (value - least) / (most - least)

    low, high = sorted((at(0), at(row.median)))
    return [rectangle(low, y - 11, high - low, 13, style),
            rectangle(at(min(row.values)), y - 5, at(max(row.values)) - at(min(row.values)), 1.5, "ink"),
            text(max(high, at(max(row.values))) + 6, y, number, "ink small")]


def _range(rows: list[Row]) -> tuple[float, float]:
    values = [value for row in rows for value in row.values]
    return min(0.0, *values), max(1.0, *values)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(json.loads(source.read_text())))
    print(f"wrote {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
