"""The table of counters against what follows it."""

from __future__ import annotations

import re
from pathlib import Path

from xdp_erm_py import shared
from xdp_erm_py.program.counters import COUNTERS

REPOSITORY = Path(__file__).resolve().parents[1]
#: What needs no cure: what the program is for, what is not for it, and what is welcome to be noted.
WELCOME = {"decapsulated", "other", "nested"}


def test_it_has_what_the_program_counts():
    assert tuple(counter.name for counter in COUNTERS) == shared.COUNTERS
    assert [counter.is_note for counter in COUNTERS] == [name in shared.NOTES for name in shared.COUNTERS]
    assert {counter.name for counter in COUNTERS if counter.cure is None} == WELCOME


def test_each_has_a_column_of_the_log():
    info = (REPOSITORY / "scripts" / "main.zeek").read_text().partition("type Info: record {")[2].partition("};")[0]
    assert tuple(re.findall(r"(\w+): Counter &log", info)) == shared.COUNTERS
