"""The arithmetic of the limiter's figures: windows, the pace of callers, medians and ratios."""

import itertools
from collections import Counter

import pytest

from benchmarks.limiter.__main__ import PARTS, parse_options
from benchmarks.limiter.figures import Part, Round, Row, tables
from benchmarks.limiter.fleet import worst_window
from benchmarks.limiter.worker import Task, own_requests


def test_the_worst_window_is_found_between_any_two_instants_and_is_half_open() -> None:
    assert worst_window([], 60.0) == 0
    assert worst_window([0.0, 59.9, 60.0, 60.1, 119.0], 60.0) == 4
    assert worst_window([60.0, 0.0], 60.0) == 1
    assert worst_window([5.0] * 7, 60.0) == 7


def task(index: int, users: int) -> Task:
    return Task(
        uri="",
        out="",
        index=index,
        workers=4,
        limit=100,
        window_seconds=10,
        users=users,
        rate_per_s=users * 8.0,
        warm_seconds=10.0,
        measured_seconds=20.0,
    )


@pytest.mark.parametrize("users", [1, 3, 4, 100])
def test_requests_keep_one_pace_and_every_user_meets_all_workers_alike(users: int) -> None:
    by_worker = [list(own_requests(task(index, users))) for index in range(4)]
    every = sorted(request for own in by_worker for request in own)
    assert len(every) == users * 8 * 30
    gaps = {round(later - earlier, 9) for (earlier, _), (later, _) in itertools.pairwise(every)}
    assert gaps == {round(1 / (users * 8), 9)}
    for own in by_worker:
        assert set(Counter(user for _, user in own).values()) == {60}


def test_table_of_medians_with_ratios_to_the_yardsticks_that_ran() -> None:
    part = Part(
        "p", "", {"rate": "per s", "us": "µs"}, lambda *_: [], ratio="rate", ratio_rows=("lucid", "absent")
    )
    rounds = [
        Round("p", number, 0.0, [Row("lucid", {"rate": rate, "us": 2.0}), Row("other", {"rate": 50.0})])
        for number, rate in enumerate([900.0, 1_000.0, 5_000.0])
    ]
    assert tables(
        part, [*rounds, Round("q", 0, 0.0, [Row("of another part", {"rate": 1.0})])]
    ).splitlines() == [
        "|  | per s | µs | spread | lucid × |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| lucid | 1,000 | 2 | 410 % | 1.0 |",
        "| other | 50 |  | 0 % | 20.0 |",
    ]


def test_options_name_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_options([]).only == list(PARTS)
    assert parse_options(["--only", "hang", "decision"]).only == ["hang", "decision"]
    with pytest.raises(SystemExit):
        parse_options(["--only", "all"])
    assert "all: not of decision compare round_trips" in capsys.readouterr().err
