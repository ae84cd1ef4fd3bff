"""Never over, and not much under, while Redis is stopped, killed, emptied, and workers die: real processes under load.

All scenarios run side by side, each with two pods of two workers over a Redis of its own (`tests/support/limit_load`
performs them, `limit_scenarios` has the bounds); in `tests/soak` the same with windows of a minute.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lucid.dev.embedded import Secantus
from tests.integration.conftest import clusters
from tests.support.limit_load import (
    PODS,
    WORKERS,
    Asked,
    Run,
    Sizes,
    admitted,
    least,
    most,
    outside,
    perform_all,
    within,
    worlds,
)
from tests.support.limit_scenarios import (
    BUSY_SECONDS,
    MOST_CHANGES,
    MOST_WAIT_SECONDS,
    edge_bound,
    emptiest,
    every_scenario,
    longest_wait,
    refused_below,
    settings_of,
    table,
    worst,
    worst_case,
)
from tests.support.servers import Backend

SIZES = Sizes(4)
LIMIT = 32
NAMES = [scenario.name for scenario in every_scenario(SIZES, LIMIT)]
BOUND = [name for name in NAMES if not name.startswith("open")]
OUTAGES = [name for name in NAMES if name not in {"strict killed", "safe killed"}]


@pytest.fixture(scope="module")
def runs(
    secantus: Secantus, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Run]]:
    folder: Path = tmp_path_factory.mktemp("faults")
    scenarios = [*every_scenario(SIZES, LIMIT), worst_case()]
    with worlds(scenarios, folder, settings_of(secantus, folder.name, clusters(backend))) as made:
        done = perform_all(scenarios, made)
        print(table(done))
        yield {run.scenario.name: run for run in done}


def needs_a_quiet_machine(run: Run) -> None:
    """That nothing is over must hold on any. That nothing is under needs one on which Redis answers in time."""
    if longest_wait(run) > BUSY_SECONDS:
        pytest.skip(f"the machine was too busy to tell:\n{table([run])}")


@pytest.mark.parametrize("name", BOUND)
def test_no_window_is_over(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    over = {
        caller.name: found for caller in run.scenario.callers for found in worst(run, caller) if found.over
    }
    assert not over, table([run])


@pytest.mark.parametrize("name", BOUND)
def test_what_there_is_is_used(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    needs_a_quiet_machine(run)
    for caller in (run.caller("user"), run.caller("public")):
        found = emptiest(run, caller)
        if not found.bound:
            pytest.skip(f"Redis was away too often in between, or too little was asked:\n{table([run])}")
        assert found.count >= found.bound, table([run])


@pytest.mark.parametrize("name", BOUND)
def test_who_stays_below_its_limit_is_not_refused_while_redis_is_well(
    runs: dict[str, Run], name: str
) -> None:
    needs_a_quiet_machine(runs[name])
    assert refused_below(runs[name]) == 0, table([runs[name]])


@pytest.mark.parametrize("name", NAMES)
def test_everybody_is_answered_soon_and_rightly(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    statuses = {each.status for each in run.asked}
    # Who had asked a worker that was killed has no answer.
    assert statuses <= ({0, 200, 429} if run.world.kills else {200, 429}), table([run])
    assert sum(each.status == 0 for each in run.asked) <= 5 * len(run.world.kills)
    assert longest_wait(run) < MOST_WAIT_SECONDS
    assert sum(caller.left_out for caller in run.scenario.callers) == 0


@pytest.mark.parametrize("name", OUTAGES)
def test_the_log_tells_of_changes_not_of_requests(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    workers = run.scenario.pods * WORKERS
    begin, end = run.world.faults[0]
    told = sum(first < end and last > begin for first, last in run.absences())
    assert told >= workers - len(run.world.kills), f"not every worker told of it: {run.lines}"
    assert sum(begin < each.sent < end for each in run.asked) > 5 * workers
    needs_a_quiet_machine(run)
    assert len(run.lines) <= MOST_CHANGES * (workers + len(run.world.kills)), run.lines


def test_a_caller_that_chooses_its_workers_reaches_the_bound_of_an_edge_and_no_more(
    runs: dict[str, Run],
) -> None:
    run = runs["safe worst case"]
    edge = run.caller("edge")
    workers = PODS * WORKERS
    let_in = admitted(edge.asked)
    assert most(let_in, run.scenario.sizes.window, [(run.begin, run.end)])[0] == len(let_in)
    assert len(let_in) == edge.limit + edge.limit * (workers - 1) // workers, table([run])


def in_the_outage(run: Run, name: str) -> int:
    """What was admitted after the last worker did without Redis; all of it in one window."""
    together = run.away_together()
    if together is None or together[1] - together[0] > run.scenario.sizes.window:
        pytest.skip(f"the machine was too busy to tell: {table([run])}\n{run.lines}")
    return sum(together[0] <= each.sent < together[1] for each in admitted(run.caller(name).asked))


def test_what_was_leased_counts_in_the_share(runs: dict[str, Run]) -> None:
    run = runs["safe worst case"]
    assert in_the_outage(run, "lease") <= run.caller("lease").limit


def test_a_worker_that_comes_in_an_outage_adds_nothing(runs: dict[str, Run]) -> None:
    run = runs["safe worst case"]
    assert in_the_outage(run, "late") <= run.caller("late").limit


def test_the_bound_can_be_broken(runs: dict[str, Run]) -> None:
    """`open` promises nothing: under this load what it does is over every bound, and is seen to be."""
    run = runs["open paused"]
    needs_a_quiet_machine(run)
    user = run.caller("user")
    assert worst(run, user)[0].count > edge_bound(run, user.limit)


@pytest.mark.parametrize("name", BOUND)
def test_one_too_many_is_seen(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    user = run.caller("user")
    bound = worst(run, user)[0].bound
    let_in = admitted(user.asked)
    _, begin = most(let_in, SIZES.window, [(run.begin, run.end)])
    held = within(let_in, begin, begin + SIZES.window)
    moment = begin + SIZES.window / 2
    more = sorted([*let_in, *[Asked(moment, moment, 200)] * (bound + 1 - held)])
    assert most(more, SIZES.window, [(run.begin, run.end)])[0] == bound + 1


def asked(*spans: tuple[float, float]) -> list[Asked]:
    return sorted(Asked(sent, answered, 200) for sent, answered in spans)


def test_a_window_counts_what_lies_wholly_inside() -> None:
    those = asked((0.0, 0.1), (1.0, 1.1), (2.0, 2.1), (2.95, 3.05), (3.0, 3.1))
    assert most(those, 3.0, [(0.0, 10.0)]) == (4, 1.0)
    assert most(those, 3.0, [(0.0, 0.0)]) == (3, 0.0), "the fourth may have been admitted after its end"
    assert most(those, 3.0, [(0.2, 0.5)]) == (4, 0.5), "it need not begin with a sending"
    assert most(those, 3.0, [(5.0, 4.0)]) == (0, 0.0)
    assert least(those, 1.0, [(0.0, 2.0)])[0] == 0
    assert least(those, 3.0, []) == (-1, 0.0)


def test_what_is_outside_of_spans() -> None:
    assert outside([(3.0, 4.0), (1.0, 2.0), (1.5, 2.5)], 0.0, 5.0) == [(0.0, 1.0), (2.5, 3.0), (4.0, 5.0)]
    assert outside([(-1.0, 6.0)], 0.0, 5.0) == []


def test_refused_and_unanswered_are_not_admitted() -> None:
    those = [Asked(0.0, 0.1, 200), Asked(0.0, 0.1, 429), Asked(0.0, 0.1, 0), Asked(0.0, 0.1, 404)]
    assert [each.status for each in admitted(those)] == [200, 404]
