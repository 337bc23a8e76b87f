"""A short run of the fuzzer, and that it notices what it is there for."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fuzz.__main__ import unreached
from fuzz.differential import CASES, distinct, run
from fuzz.generator import LONGEST, SHORTEST, Generator
from xdp_erm_py.program.reference import Session, decapsulate

FRAMES = 8192


def test_program_and_reference_agree(xdp):
    result = run("1", FRAMES)
    assert result.mismatches == []
    assert unreached(result) == []
    assert result.frames >= FRAMES
    assert {(levels, tagged) for levels, tagged, _, _ in result.shapes} \
        == set(itertools.product((1, 2, 3), (False, True)))


def test_one_seed_gives_the_same_frames():
    def take(seed, number, of):
        return list(itertools.islice(distinct(Generator(seed), (number, of)), 2000))

    frames = take("1", 0, 1)
    assert frames == take("1", 0, 1)
    assert len(set(frames)) == len(frames)
    assert all(SHORTEST <= len(frame) <= LONGEST for frame in frames)
    assert frames != take("2", 0, 1)
    assert set(take("1", 0, 2)).isdisjoint(take("1", 1, 2))


def wrong_verdict(expected):
    return dataclasses.replace(expected, verdict="truncated") if expected.verdict == "malformed" else expected


def wrong_byte(expected):
    if expected.verdict != "decapsulated" or not expected.frame.endswith(b"\1"):
        return expected
    return dataclasses.replace(expected, frame=expected.frame[:-1] + b"\2")


def wrong_cut(expected):
    return dataclasses.replace(expected, frame=expected.frame + b"\1") if expected.levels == 3 else expected


def wrong_note(expected):
    return dataclasses.replace(expected, inner_truncated=False)


def wrong_refusal(expected):
    return dataclasses.replace(expected, nested_refused=False)


def wrong_session(expected):
    if expected.session != Session("198.51.100.2", 4):
        return expected
    return dataclasses.replace(expected, session=Session("198.51.100.2", 3))


@pytest.mark.parametrize("error", [wrong_verdict, wrong_byte, wrong_cut, wrong_note, wrong_refusal, wrong_session])
def test_a_wrong_oracle_is_noticed(xdp, error):
    """Each mismatch names the frame, whose expectation is then indeed wrong."""
    def oracle(frame, config):
        return error(decapsulate(frame, config))

    case = next(case for case in CASES if case[0].depth == 3)
    result = run("1", FRAMES, oracle=oracle, cases=[case])
    assert result.mismatches
    for mismatch in result.mismatches:
        frame = bytes.fromhex(mismatch.partition("frame ")[2].partition("\n")[0])
        assert oracle(frame, case[0]) != decapsulate(frame, case[0])
