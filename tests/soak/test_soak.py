"""Each fault once; `make soak` goes on for as long as wanted. And what the books notice."""

from __future__ import annotations

import struct
import time

import filters
import pytest

from soak import soak as module
from soak.books import Life
from soak.faults import FAULTS, Fault
from soak.soak import Soak, soak
from soak.wire import Wire
from xdp_erm_py import shared
from xdp_erm_py.interface import ours
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links


@pytest.mark.nightly
def test_every_fault_once(xdp):
    done = soak(0, 1)
    assert done.wrong == []
    assert all(done.done[fault.name] == 1 for fault in FAULTS)
    assert done.wire.counted["sent"] > 1000 * len(FAULTS)


def bare(run: Soak) -> None:
    """Takes the program off for a moment."""
    run.command("detach")
    run.attach(run.config)


def miscount(run: Soak) -> None:
    with Links() as links, bpf.Map.by_id(ours.find_all(links)[0].maps["counters"]) as counters:
        key = struct.pack("=I", shared.COUNTERS.index("other"))
        values = counters.lookup(key)
        counters.update(key, b"".join(struct.pack("=QQ", 1 + struct.unpack("=QQ", value)[0], 0) for value in values))


def swallow(run: Soak) -> None:
    time.sleep(0.3)
    run.wire.counted["sent"] += 1


def overstate(run: Soak) -> None:
    """Zeek is told of a packet more than was counted."""
    life: Life = next(iter(run.books.lives.values()))
    run.publisher.stop(module.signal.SIGKILL)
    run.zeek.logged[life.attached_at.replace("Z", ".000")]["decapsulated", 0] += 10**6
    run.publisher.start()


def leak(run: Soak) -> None:
    """Takes the filter away."""
    filters.take_away(run.name)
    time.sleep(0.3)


@pytest.mark.parametrize("act, claim", [
    (leak, "frames have reached the host"), (bare, "frames have no verdict"), (miscount, "counted so"),
    (swallow, "frames vanished before the program"), (overstate, "Zeek was told")])
def test_what_is_wrong_is_noticed(xdp, monkeypatch, act, claim):
    monkeypatch.setattr(module, "FAULTS", [Fault("a lie", lambda run: act(run))])
    assert claim in str(soak(0, 1).wrong)


def test_a_frame_that_is_altered_is_noticed(xdp, monkeypatch):
    original = Wire._compare
    monkeypatch.setattr(Wire, "_compare", lambda wire, frame: original(wire, frame[:-1] + b"?"))
    monkeypatch.setattr(module, "FAULTS", [Fault("nothing", lambda run: run.nap(0.3))])
    assert "not as any configuration in force makes it" in str(soak(0, 1).wrong)


def test_what_is_left_behind_is_noticed(xdp, monkeypatch):
    monkeypatch.setattr(module, "FAULTS", [Fault("nothing", lambda run: run.nap(0.3))])
    monkeypatch.setattr(Soak, "command", _all_but_detach(Soak.command))
    monkeypatch.setattr(Soak, "leave", _impatiently(monkeypatch, Soak.leave))
    with pytest.raises(RuntimeError, match=r"waited 2 s in vain until program \d+ is gone"):
        soak(0, 1)


def _all_but_detach(original):
    return lambda run, name, *rest, **named: None if name == "detach" else original(run, name, *rest, **named)


def _impatiently(monkeypatch, original):
    def leave(run, before):
        monkeypatch.setattr(module, "SECONDS", 2)
        original(run, before)
    return leave
