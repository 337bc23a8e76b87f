"""What was measured: a row for each thing, with a value for each round."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any


@dataclasses.dataclass
class Row:
    group: str
    name: str
    unit: str
    values: list[float] = dataclasses.field(default_factory=list)
    """One for each round; none where it cannot be measured here, which the note explains."""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @classmethod
    def of(cls, document: dict[str, Any]) -> Row:
        """What as_dict() made."""
        return cls(**{field.name: document[field.name] for field in dataclasses.fields(cls)})

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "median": self.median if self.values else None}


def text(rows: list[Row]) -> str:
    """All rows as one table: median, smallest and largest value of the rounds."""
    lines = []
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            lines += ["", f"{group:56}{'median':>12}  {'spread':25}"]
        if row.values:
            spread = f"{number(min(row.values))} .. {number(max(row.values))}" if len(row.values) > 1 else ""
            line = f"{row.name:56}{number(row.median):>12}  {spread:25}{row.unit:14}{row.note}"
        else:
            line = f"{row.name:56}{'-':>12}  {row.note}"
        lines.append(line.rstrip())
    return "\n".join(lines[1:])


def as_json(document: dict[str, Any]) -> str:
    """With each row in a line of its own."""
    first = json.dumps({**document, "rows": []}).removesuffix("]}")
    return first + "\n" + ",\n".join(json.dumps(row) for row in document["rows"]) + "\n]}\n"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.3g}"
