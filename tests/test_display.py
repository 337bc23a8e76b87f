"""Tables on terminals of any width: a number is there as a whole, or not at all."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from xdp_erm_py import display, shared

PACKETS, BYTES = 698764922, 18446744073709551615


def reading(name: str = "eth1") -> dict:
    sessions = [{"encapsulation": "erm", "source": "192.168.100.200", "id": 65535, "packets": PACKETS, "bytes": BYTES,
                 "last_seen": "2026-11-30T00:00:00.000Z"}]
    return {"name": name, "ifindex": 9, "mode": "native", "id": "1", "attached_at": "2026-11-30T00:00:00Z",
            "sessions": sessions,
            "counters": {counter: {"packets": PACKETS, "bytes": BYTES} for counter in shared.COUNTERS},
            "cpus": {"1": {"steered": PACKETS, "dropped": PACKETS}}, "foreign": sessions}


@pytest.fixture(params=range(34, 100, 3))
def terminal(request, monkeypatch) -> Console:
    console = Console(width=request.param, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(display, "_console", lambda: console)
    return console


def check(terminal: Console) -> set[str]:
    """What is shown of numbers, each of which must be one of those there are."""
    lines = terminal.file.getvalue().splitlines()
    assert max(map(len, lines)) <= terminal.width
    numbers = {word for line in lines for word in line.split() if re.fullmatch(r"[\d,]+", word)}
    assert numbers <= {f"{PACKETS:,}", f"{BYTES:,}", "0", "1"}, lines
    assert "…" not in terminal.file.getvalue()
    return numbers


def test_counters(terminal):
    display.stats([reading()])
    assert f"{PACKETS:,}" in check(terminal)


def test_rates(terminal):
    terminal.print(display.rate_tables([reading()], {}, 1.0))
    check(terminal)


def test_all_columns_are_there_where_there_is_room(monkeypatch):
    console = Console(width=120, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(display, "_console", lambda: console)
    display.stats([reading()])
    shown = console.file.getvalue()
    assert all(word in shown for word in ("share", "last seen", "2026-11-30T00:00:00.000Z", f"{BYTES:,}"))


@pytest.mark.parametrize("encoding, bar", [("utf-8", "━"), ("latin-1", "="), ("ascii", "=")])
def test_bars_are_of_what_can_be_written(monkeypatch, encoding, bar):
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", file)
    before = reading()
    before["counters"] = {counter: {"packets": 0, "bytes": 0} for counter in shared.COUNTERS}
    Console(file=file, width=120).print(display.rate_tables([reading()], {9: before}, 1.0))
    file.flush()
    assert 20 * bar in file.buffer.getvalue().decode(encoding)
