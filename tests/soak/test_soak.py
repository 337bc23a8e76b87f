"""Each fault once; `make soak` goes on for as long as wanted. And what the books notice."""

from __future__ import annotations

from soak.faults import FAULTS
from soak.soak import soak


def test_every_fault_once(xdp, capsys):
    done = soak(0, 1)
    assert done.wrong == []
    assert all(done.done[fault.name] == 1 for fault in FAULTS)
    assert done.wire.counted["sent"] > 1000 * len(FAULTS)
