"""`make bench` measures what it says: counters prove it. How long things take is no matter of tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from machine import needs_zeek

from bench import alternatives, balance, cost, helper, load, table, way, zeek
from bench.__main__ import main
from xdp_erm_py import lab
from xdp_erm_py.interface import isolation, ours
from xdp_erm_py.kernel import bpf
from xdp_erm_py.lab import generate
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, Cable
from xdp_erm_py.settings import InterfaceConfig

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 0.8  # under load
COSTS = (cost.NO_OP, "strip", cost.NESTED_NO_OP, "nested, 2 levels", cost.DEFAULT, cost.ON_THE_WAY)


@pytest.fixture(scope="module")
def programs(xdp: None) -> Iterator[Path]:
    with load.programs() as directory:
        yield directory


# What the XDP program costs


@pytest.mark.parametrize("name", cost.cases())
def test_each_frame_is_counted_as_its_row_says(xdp: None, name: str) -> None:
    """Whatever stands in the frame, as what is read and changed of it is written anew, and the rest stays as it is."""
    case = cost.cases()[name]
    with cost.loaded(case) as loaded:
        loaded.nanoseconds(1000)
        assert loaded.counted() == dict.fromkeys(case.counters, 1000)
        for runs, filling in enumerate((b"\0", b"\xff", b"\x08\x00"), 1):  # the last is IPv4's EtherType
            garbage = (filling * len(case.frame))[:len(case.frame)]
            _, left = bpf.test_run(loaded.program, garbage)
            assert loaded.counted() == dict.fromkeys(case.counters, 1000 + runs)
            assert left.endswith(garbage[case.headers:])


def test_the_whole_way_ends_in_the_members_ring(programs: Path) -> None:
    with cost.receiver(programs) as member, cost.loaded(cost.cases()[cost.ON_THE_WAY]) as loaded:
        loaded.nanoseconds(5000)
        reading = load.settled(member)
    assert sum(reading.packets) + reading.ring_drops == 5000
    assert reading.wrapped == 0


@pytest.mark.parametrize("name", way.ways())
def test_the_whole_way_is_what_its_row_says(xdp: None, name: str) -> None:
    each = way.ways()[name]
    with way.stack(each.isolated) as (namespace, taken), cost.loaded(each.case) as loaded, namespace.entered():
        loaded.nanoseconds(1000)
        assert loaded.counted() == dict.fromkeys(each.case.counters, 1000)
        marked = each.isolated and each.case.config.isolate
        assert isolation.taken(taken) == (1000 if marked else 0, 0)


# How many packets reach members


@pytest.mark.parametrize("arrangement", balance.ARRANGEMENTS)
def test_members_share_what_is_decapsulated(programs: Path, arrangement: str) -> None:
    config = balance.ARRANGEMENTS[arrangement]
    with balance.arranged(config) as cable:
        found = balance.measure(cable, programs, balance.Case(arrangement, "no work", 2), SECONDS)
    assert sum(found.packets) > 0
    if config:
        assert min(found.packets) > 0 and found.wrapped == 0
    else:
        assert min(found.packets) == 0 and found.wrapped == pytest.approx(sum(found.packets))


def test_drops_are_told_by_place(programs: Path) -> None:
    """A member that takes a millisecond for a packet: its ring must overflow. And a veth that takes no frame at all."""
    layout = generate.layout_of(512, 0, False)
    with balance.arranged(InterfaceConfig()) as cable, cable.sensor.entered(), \
            load.Members(programs, SENSOR_INTERFACE, 1, 1_000_000) as members, load.Load(cable, layout) as sending:
        found = load.reached(sending, members, SECONDS)
    assert found.dropped_at_rings > 10 * sum(found.packets)
    assert found.dropped_at_veth + found.dropped_at_rings < 1.5 * found.offered  # none is told twice
    with Cable() as cable, cable.sensor.entered(), load.Members(programs, SENSOR_INTERFACE, 1) as members, \
            load.Load(cable, layout) as sending:
        found = load.reached(sending, members, SECONDS)
    assert found.dropped_at_veth == found.offered > 0


def test_the_generator_alone_is_measured_where_frames_arrive(xdp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert balance.generator_alone(10_000) > 0
    monkeypatch.setattr(balance, "sent", lambda cable: 9_999)
    with pytest.raises(RuntimeError, match="of 10000 frames"):
        balance.generator_alone(10_000)


def test_all_cpus_at_once_are_compared_with_the_first(xdp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def run_live(program: int, frame: bytes, count: int) -> int:
        used.append(os.sched_getaffinity(0))
        return count // 10

    before = os.sched_getaffinity(0)
    monkeypatch.setattr(bpf, "run_live", run_live)
    assert balance.together(1000) == len(before)
    assert sorted(map(sorted, used)) == sorted([[cpu] for cpu in before] + [[min(before)]])
    assert os.sched_getaffinity(0) == before


# What one would do without it


@pytest.mark.parametrize("name", alternatives.WAYS)
def test_each_way_takes_the_wrapping_off(programs: Path, name: str) -> None:
    with alternatives.WAYS[name](programs) as (cable, interface, layout), cable.sensor.entered(), \
            load.Members(programs, interface, 2) as members, load.Load(cable, layout) as sending:
        found = load.reached(sending, members, SECONDS)
    assert min(found.packets) > 0
    assert found.wrapped == 0


def test_vxlan_carries_the_same_frames() -> None:
    layout = generate.layout_of(512, 0, False)
    other = alternatives.within_vxlan(layout)
    assert other.frame[other.headers - (layout.headers - generate.MIRRORED):] == layout.frame[generate.MIRRORED:]


# Zeek

@pytest.mark.nightly
@needs_zeek
@pytest.mark.parametrize("case", zeek.CASES, ids=[case.name for case in zeek.CASES])
def test_zeek_loses_nothing_of_a_trickle_and_something_of_a_flood(xdp: None, monkeypatch: pytest.MonkeyPatch,
                                                                    case: zeek.Case) -> None:
    """The flood is as much as the generator makes, in each burst of which more than all rings hold."""
    monkeypatch.setattr(zeek, "RING", "AF_Packet::buffer_size=1048576")
    assert zeek.without_loss(case, (1000, 5_000_000), 2 * SECONDS) == pytest.approx(1000, rel=0.5)


def test_a_machine_without_zeek_has_lines_that_say_so(xdp: None, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.zeek, "PLACES", (str(tmp_path),))
    rows = zeek.run(tmp_path, True)
    assert [row.name for row in rows] == [case.name for case in zeek.CASES]
    assert not any(row.values for row in rows)
    assert all("cannot be measured here" in row.note and "Zeek" in row.note for row in rows)


# The helper


def test_swaps_lose_nothing(programs: Path) -> None:
    took, lost, wrapped = helper.swapping(programs, 3)
    assert len(took.values) == 3
    assert lost.values == [0] and wrapped.values == [0]


def test_an_interruption_would_be_seen(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel allows no swap between modes."""
    monkeypatch.setattr(helper, "CONFIGS", (InterfaceConfig(mode="generic"), InterfaceConfig(mode="native")))
    _, lost, _ = helper.swapping(programs, 4)
    assert lost.values[0] > 0


def test_all_maps_have_a_size(xdp: None) -> None:
    sizes = {row.name: row.values[0] for row in helper.memory()}
    assert all(size > 0 for size in sizes.values())
    assert {"program, jited", "program, translated", "map counters", "map sessions",
            f"map {ours.STATE_MAP}"} <= sizes.keys()


# All of it


class Quick(NamedTuple):
    """What a quick run prints and writes, and what its rows' names must begin with."""

    output: str
    rows: list[dict[str, object]]
    picture: Path
    expected: list[str]


@pytest.fixture(scope="module")
def quick(xdp: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quick]:
    """A quick run of a case or two of each kind."""
    directory = tmp_path_factory.mktemp("bench")
    result, picture = directory / "bench.json", directory / "bench.svg"
    words = ["bench", "--quick", "--json", str(result), "--plot", str(picture)]
    costs = {name: cost.cases()[name] for name in COSTS}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", words)
        patch.setattr(cost, "cases", lambda: costs)
        patch.setattr(balance, "ARRANGEMENTS", dict(list(balance.ARRANGEMENTS.items())[:3]))
        patch.setattr(balance, "MEMBERS", balance.MEMBERS[:2])
        patch.setattr(zeek, "CASES", zeek.CASES[:1])
        patch.setattr(alternatives, "WAYS", dict(list(alternatives.WAYS.items())[:1]))
        main()
        names = [*costs, *(f"the whole way, {name}" for name in way.ways()), *(case.name for case in balance.cases()),
                 *alternatives.WAYS, zeek.CASES[0].name, "attach", "publisher, CPU"]
    yield Quick(output.getvalue(), json.loads(result.read_text())["rows"], picture, names)


@pytest.mark.nightly
def test_every_row_is_in_table_and_json(quick: Quick) -> None:
    names = [str(row["name"]) for row in quick.rows]
    assert len(set(names)) == len(names)
    for name in quick.expected:
        assert any(row.startswith(name) for row in names), name
    for row in quick.rows:
        assert f"\n{row['name']} " in quick.output
        assert row["values"] or row["note"]


def test_the_command_says_what_it_takes() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "--only", "nothing"], cwd=ROOT, text=True,
                          capture_output=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr


@pytest.mark.nightly
def test_the_picture_has_each_case(quick: Quick) -> None:
    drawn = [element.text for element in ElementTree.parse(quick.picture).iter("{http://www.w3.org/2000/svg}text")]
    for row in quick.rows:
        if row["group"] == cost.GROUP and row["unit"] == "ns over no-op":
            assert drawn.count(str(row["name"])) == 1
    for arrangement in list(balance.ARRANGEMENTS)[:3]:
        assert drawn.count(arrangement) == 2 + (arrangement in COSTS)


def test_what_cannot_be_measured_stays_a_line() -> None:
    rows = [table.Row("group", "one", "ns", [3, 1, 2]), table.Row("group", "other", "ns", note="not here")]
    assert table.text(rows).splitlines()[1].split() == ["one", "2.0", "1.0", "..", "3.0", "ns"]
    assert table.text(rows).splitlines()[2].split() == ["other", "-", "not", "here"]
    assert rows[1].as_dict()["median"] is None
