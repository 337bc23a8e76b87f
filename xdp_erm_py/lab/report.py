"""The lab's two runs side by side: with colours where a person looks, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import NamedTuple

from .fanout import Result

BAR_LEN = 8
EIGHTHS = " ▏▎▍▌▋▊▉"


class Row(NamedTuple):
    label: str
    without: str
    with_xdp_erm: str


HEADINGS = Row("", "without xdp-erm", "with xdp-erm")


def print_report(without: Result, with_xdp_erm: Result, counters: dict[str, dict[str, int]]) -> None:
    """Print both runs as one table of at most 80 columns, then the counters of the second run that are not zero."""
    rows = _rows(without, with_xdp_erm)
    counted = {name: counter for name, counter in counters.items() if counter["packets"]}
    if sys.stdout.isatty():
        _print_rich(rows, counted)
    else:
        _print_plain(rows, counted)


def _rows(*runs: Result) -> list[Row]:
    columns = f"{'':{BAR_LEN}} {'share':>6} {'packets':>7} {'flows':>5}"
    workers = range(len(runs[0].packets))
    return [
        Row("", columns, columns),
        *(Row(f"worker {number + 1}", *(_worker(run, number) for run in runs)) for number in workers),
        Row("sent", *(f"{run.sent} packets" for run in runs)),
        Row("arrived", *(f"{run.sent - run.missing} packets" for run in runs)),
        *([] if runs[0].identical is None else
          [Row("byte-identical", *(f"{run.identical} of {run.mirrored} mirrored" for run in runs))]),
        Row("socket drops", *(f"{run.dropped} packets" for run in runs)),
        Row("flows", *(f"{len(run.workers_by_flow)}, {run.split_flows} split" for run in runs)),
    ]


def _worker(run: Result, number: int) -> str:
    share = run.packets[number] / max(sum(run.packets), 1)
    return f"{_bar(share)} {share:6.1%} {run.packets[number]:>7} {run.flows_of(number):>5}"


def _bar(share: float) -> str:
    if not sys.stdout.isatty():
        return ("#" * round(share * BAR_LEN)).ljust(BAR_LEN)
    blocks, eighths = divmod(round(share * BAR_LEN * 8), 8)
    return ("█" * blocks + EIGHTHS[eighths]).ljust(BAR_LEN)[:BAR_LEN]


def _print_rich(rows: list[Row], counted: dict[str, dict[str, int]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, style in zip(HEADINGS, ("bold", "yellow", "green")):
        table.add_column(heading, style=style, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, counter in counted.items():
        console.print(f"[bold]{name}[/]: {counter['packets']} packets, {counter['bytes']} bytes")


def _print_plain(rows: list[Row], counted: dict[str, dict[str, int]]) -> None:
    lines = [HEADINGS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    for name, counter in counted.items():
        print(f"{name}: {counter['packets']} packets, {counter['bytes']} bytes")
