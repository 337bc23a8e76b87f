"""A picture of the two figures people care about: what a packet costs, and how many reach the members."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from . import balance, cost
from .table import Row

# The colours of Okabe and Ito, which those tell apart who see few.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def write(path: Path, machine: str, rows: list[Row]) -> None:
    """A PNG file; a panel stays empty where its group was not run."""
    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 7), layout="constrained")
    figure.suptitle(f"xdp-erm: {machine}", fontsize=10)
    _cost(left, [row for row in rows if row.group == cost.GROUP and row.unit == "ns over no-op"])
    _balance(right, {row.name: row for row in rows if row.group == balance.GROUP})
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def _cost(axes: matplotlib.axes.Axes, rows: list[Row]) -> None:
    bars = axes.barh([row.name for row in rows], [row.median for row in rows], xerr=_spread(rows), color=COLOURS[0])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_title("What the XDP program costs a packet")
    axes.set_xlabel("ns over a program that does nothing (median, smallest to largest)")


def _balance(axes: matplotlib.axes.Axes, rows: dict[str, Row]) -> None:
    groups = [(demand, members) for demand in balance.DEMANDS for members in balance.MEMBERS]
    width = 0.8 / len(balance.ARRANGEMENTS)
    for number, arrangement in enumerate(balance.ARRANGEMENTS):
        found = [rows[case.name] for case in (balance.Case(arrangement, *group) for group in groups)
                 if case.name in rows]
        places = [place + number * width for place in range(len(found))]
        axes.bar(places, [row.median / 1e6 for row in found], width, yerr=_spread(found, 1e6), label=arrangement,
                 color=COLOURS[number % len(COLOURS)])
    labels = [f"{members} member{'s' if members > 1 else ''}\n{demand}".replace(" at ", "\nat ")
              for demand, members in groups]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], labels,
                    fontsize=8)
    axes.set_title("Packets that reach AF_PACKET members")
    axes.set_ylabel("million packets per second")
    axes.legend()


def _spread(rows: list[Row], unit: float = 1.0) -> list[list[float]]:
    """How far below and above the medians the rounds were."""
    return [[(row.median - min(row.values)) / unit for row in rows],
            [(max(row.values) - row.median) / unit for row in rows]]
