"""Tables of status and counters for people, and rates while they watch."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Any

from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from . import shared
from .interface import stats as reading
from .printable import printable, say
from .program.counters import BY_NAME
from .settings import PORTS, cpu_list

_NOTHING = "xdp-erm is not attached to any interface of this network namespace"

# Switch sessions shown while watching: the busiest ones, so that the table fits a screen.
_SESSIONS_WATCHED = 10
# Foreign senders shown: those with most packets. A flood of made-up ones would push everything else off the screen.
_SENDERS_SHOWN = 10

_GOOD, _BAD, _PLAIN = "green", "yellow", ""


def _style(counter: str, packets: float) -> str:
    if packets and counter == "decapsulated":
        return _GOOD
    return _BAD if packets and BY_NAME[counter].cure else _PLAIN


def _console() -> Console:
    # Where the output is no terminal nobody's width is known, and rich would cut the table at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)


def _printable(value: Any) -> Any:
    """A reading with nothing in its texts that a terminal would obey: names are the interfaces', the rest may be any
    root process's."""
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def status(interfaces: list[dict[str, Any]]) -> None:
    """One row an interface."""
    if not interfaces:
        print(_NOTHING)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("interface", "mode", "program", "isolated", "spread", "since", "configuration"):
        table.add_column(column, overflow="fold")
    for interface in _printable(interfaces):
        configuration = " ".join(f"{key}={_shown(value)}" for key, value in interface["config"].items()
                                 if value not in ([], False) and not key.startswith("spread")
                                 and key not in _ports_of_none(interface["config"]))
        mode = f"{interface['mode']}, NOT RUN" if interface["unseen"] else interface["mode"]
        table.add_row(interface["name"], mode, str(interface["program_id"]), _isolated(interface),
                      _spread(interface["spread"]), interface["attached_at"], configuration)
    _console().print(table)


def _ports_of_none(settings: dict[str, Any]) -> set[str]:
    """The settings of ports of encapsulations that are not taken."""
    taken = settings.get("encapsulations", ["erm"])  # earlier versions took no other
    return {name for encapsulation, name in PORTS.items() if encapsulation not in taken}


def _isolated(interface: dict[str, Any]) -> str:
    if not interface["isolated"]:
        return "no"
    if interface["leaked"]:
        return f"no, {interface['leaked']:,} frames reached the host"
    return f"after {', '.join(interface['isolated_after'])}" if interface["isolated_after"] else "yes"


def _spread(spread: dict[str, Any] | None) -> str:
    """How, and over which CPUs; None: by a version that did not do it."""
    if not spread or not spread["cpus"]:
        return "none"
    return f"{spread['how']} {cpu_list(spread['cpus'])}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "on" if value is True else str(value)


def stats(interfaces: list[dict[str, Any]]) -> None:
    """All counters and sessions of each interface."""
    if not interfaces:
        print(_NOTHING)
        return
    _console().print(Group(*_tables(_printable(interfaces))))


def _tables(interfaces: list[dict[str, Any]]) -> Iterator[RenderableType]:
    for interface in interfaces:
        yield Text(f"{interface['name']}: {interface['mode']}, since {interface['attached_at']}", style="bold")
        total = sum(interface["counters"][verdict]["packets"] for verdict in shared.VERDICTS)
        table = _counter_table("packets", "bytes", "share")
        for name, counter in interface["counters"].items():
            share = f"{counter['packets'] / total:.1%}" if total else "-"
            table.add_row(name, f"{counter['packets']:,}", f"{counter['bytes']:,}", share,
                          style=_style(name, counter["packets"]))
        yield table
        if interface["cpus"]:
            yield _cpu_table(interface["cpus"])
        if interface["sessions"]:
            yield _session_table(interface["sessions"])
        yield from _foreign(interface)
        yield Text()


class _Columns:
    """A table that leaves its last columns out where the terminal has no room for them: a number that is cut is another
    number."""

    def __init__(self, first: str, width: int, *numbers: str, last: str | None = None, last_width: int = 0) -> None:
        """Its first column is at least `width` characters wide; then come those of numbers, and one more text."""
        self._columns: list[tuple[str, JustifyMethod, int]] = [
            (first, "left", width), *((number, "right", 14) for number in numbers)]
        if last is not None:
            self._columns.append((last, "left", last_width))
        self._rows: list[tuple[tuple[str, ...], str]] = []

    def add_row(self, *cells: str, style: str = _PLAIN) -> None:
        self._rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tables = (self._table(count, wide) for count in range(len(self._columns), 0, -1) for wide in (True, False))
        for table in tables:
            if table.__rich_measure__(console, options.update(width=1 << 16)).minimum <= options.max_width:
                break
        yield table

    def _table(self, count: int, wide: bool) -> Table:
        """With so many columns; if `wide`, these have no less than the width that makes tables look alike."""
        table = Table(box=None, pad_edge=False)
        for name, justify, width in self._columns[:count]:
            table.add_column(name, justify=justify, min_width=width if wide else None, overflow="fold")
        for cells, style in self._rows:
            table.add_row(*cells[:count], style=style)
        return table


def _counter_table(*columns: str, **last: Any) -> _Columns:
    return _Columns("verdict", 18, *columns, **last)


def _cpu_table(cpus: dict[str, dict[str, int]]) -> _Columns:
    table = _Columns("to CPU", 18, "packets", "dropped")
    for cpu, frames in cpus.items():
        table.add_row(cpu, f"{frames['steered']:,}", f"{frames['dropped']:,}",
                      style=_BAD if frames["dropped"] else _PLAIN)
    return table


def _session_name(session: dict[str, Any]) -> str:
    source = f"[{session['source']}]" if ":" in session["source"] else session["source"]
    return f"{source}:{session['id']}" if session["encapsulation"] == "erm" else \
        f"{session['encapsulation']} {source}:{session['id']}"


def _session_table(sessions: Iterable[dict[str, Any]]) -> _Columns:
    table = _Columns("switch session", 21, "packets", "bytes", last="last seen")
    for session in sessions:
        table.add_row(_session_name(session), f"{session['packets']:,}",
                      f"{session['bytes']:,}", session["last_seen"])
    return table


def _foreign(interface: dict[str, Any]) -> Iterator[RenderableType]:
    """Who sent what the allow lists keep out; nothing where there is nobody."""
    senders = interface["foreign"]
    if not senders:
        return
    table = _Columns("foreign sender", 21, "packets", "bytes", last="last seen")
    for sender in senders[:_SENDERS_SHOWN]:
        table.add_row(sender["source"], f"{sender['packets']:,}", f"{sender['bytes']:,}", sender["last_seen"],
                      style=_BAD)
    yield table
    hidden = len(senders) - _SENDERS_SHOWN
    if hidden > 0:
        yield Text(f"and {hidden} more: xdp-erm stats {interface['name']} --json", style="dim")


def watch(name: str | None, seconds: float, as_json: bool) -> int:
    """Reads the counters every `seconds` until interrupted: a live table on a terminal, else a line a reading."""
    # As after Ctrl-C, a terminal gets its own screen back.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    readings = _readings(name, seconds)
    if as_json:
        for _, interfaces in readings:
            print(json.dumps({"interfaces": interfaces}), flush=True)
    elif sys.stdout.isatty():
        before: dict[int, dict[str, Any]] = {}
        with Live(Text("reading ..."), console=_console(), screen=True, auto_refresh=False) as live:
            for elapsed, interfaces in readings:
                live.update(rate_tables(_printable(interfaces), before, elapsed), refresh=True)
                before = {interface["ifindex"]: interface for interface in interfaces}
    else:
        before = {}
        for elapsed, interfaces in readings:
            for interface in interfaces:
                say(_line(interface, before.get(interface["ifindex"]), elapsed))
            if not interfaces:
                print(_NOTHING, flush=True)
            before = {interface["ifindex"]: interface for interface in interfaces}
    return 0


def _readings(name: str | None, seconds: float) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    """(seconds since the reading before, what was read), for ever."""
    last = time.monotonic()
    while True:
        interfaces = reading.snapshot(name)
        now = time.monotonic()
        yield now - last, interfaces
        last = now
        time.sleep(seconds)


def _rate(interface: dict[str, Any], before: dict[str, Any] | None, counter: str, unit: str, elapsed: float) -> float:
    """Per second. Zero at the first reading, and where the program was attached anew in between."""
    if before is None or before["id"] != interface["id"] or elapsed <= 0:
        return 0.0
    counted: int = interface["counters"][counter][unit] - before["counters"][counter][unit]
    return max(0.0, counted / elapsed)


def rate_tables(interfaces: list[dict[str, Any]], before: dict[int, dict[str, Any]],
                elapsed: float) -> RenderableType:
    """A reading beside the one `before` it, by the interfaces' indices, `elapsed` seconds earlier."""
    parts: list[RenderableType] = [Text(f"xdp-erm  {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC   Ctrl-C ends",
                                        style="dim"), Text()]
    if not interfaces:
        parts.append(Text(_NOTHING))
    bar = "=" if _console().options.ascii_only else "━"
    for interface in interfaces:
        earlier = before.get(interface["ifindex"])
        rates = {name: _rate(interface, earlier, name, "packets", elapsed) for name in shared.COUNTERS}
        busiest = max(rates.values()) or 1.0
        parts.append(Text(f"{interface['name']}: {interface['mode']}, since {interface['attached_at']}", style="bold"))
        table = _counter_table("packets/s", "Mbit/s", "packets", last="", last_width=20)
        for name, rate in rates.items():
            megabits = _rate(interface, earlier, name, "bytes", elapsed) * 8 / 1e6
            packets = interface["counters"][name]["packets"]
            table.add_row(name, f"{rate:,.0f}", f"{megabits:,.2f}", f"{packets:,}", bar * round(20 * rate / busiest),
                          style=_style(name, packets))
        parts.append(table)
        if interface["cpus"]:
            parts.append(_cpu_table(interface["cpus"]))
        parts.append(_session_table(interface["sessions"][:_SESSIONS_WATCHED]))
        hidden = len(interface["sessions"]) - _SESSIONS_WATCHED
        if hidden > 0:
            parts.append(Text(f"and {hidden} quieter sessions: xdp-erm stats {interface['name']}", style="dim"))
        parts += _foreign(interface)
        parts.append(Text())
    return Group(*parts)


def _line(interface: dict[str, Any], before: dict[str, Any] | None, elapsed: float) -> str:
    """Rates of everything that moved, in one line."""
    rates = {name: _rate(interface, before, name, "packets", elapsed) for name in shared.COUNTERS}
    megabits = sum(_rate(interface, before, name, "bytes", elapsed) for name in shared.VERDICTS) * 8 / 1e6
    moved = [f"{name}={rate:.0f}/s" for name, rate in rates.items() if rate or name == "decapsulated"]
    dropped = sum(cpu["dropped"] for cpu in interface["cpus"].values())
    queues = f" {dropped} dropped at CPUs" if dropped else ""
    foreign = f" {len(interface['foreign'])} foreign senders" if interface["foreign"] else ""
    return (f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} {interface['name']} {' '.join(moved)} "
            f"{megabits:.2f} Mbit/s {len(interface['sessions'])} sessions{queues}{foreign}")
