"""The scenarios of `tests/integration/test_limits_in_faults` with the real window, every fault in both modes."""

import pytest

from lucid.dev.embedded import Secantus
from tests.integration.conftest import clusters
from tests.support.limit_load import Sizes, perform_all, worlds
from tests.support.limit_scenarios import every_scenario, settings_of, table, worst_case, wrong
from tests.support.servers import Backend

pytestmark = pytest.mark.soak

SIZES = Sizes(60)
LIMIT = 600


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_never_over_and_not_much_under(
    secantus: Secantus, backend: Backend, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("faults")
    scenarios = [*every_scenario(SIZES, LIMIT, seed=seed, whole=True), worst_case()]
    with worlds(scenarios, folder, settings_of(secantus, folder.name, clusters(backend))) as made:
        runs = perform_all(scenarios, made)
    print(table(runs))
    faults = {run.scenario.name: wrong(run) for run in runs if run.scenario.redis_down != "open"}
    assert not any(faults.values()), faults
