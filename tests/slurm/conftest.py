from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, Cluster
from tests.slurm.packages import ClusterError, install_packages, why_impossible
from tests.slurm.small_runs import Setting, launch, losses, write_config


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_impossible():
        pytest.skip(reason)
    try:
        install_packages()
    except ClusterError as error:
        pytest.skip(str(error))
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def reachable_cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The four-node cluster, with this process's environment pointing at it."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in running_cluster.environment.items():
            patched.setenv(name, value)
        # A small machine runs several ranks: more threads than CPUs would only slow them.
        patched.setenv("OMP_NUM_THREADS", "1")
        yield running_cluster


@pytest.fixture
def slurm_cluster(reachable_cluster: Cluster) -> Iterator[Cluster]:
    """The four-node cluster, for one test alone."""
    yield reachable_cluster
    for node in NODES:
        if reachable_cluster.pid_of(node) is None:
            reachable_cluster.start_node(node)
    reachable_cluster.run("scancel", "--user=root")
    reachable_cluster.wait_until_idle()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "small.yaml", small_shards)


@pytest.fixture(scope="session")
def undisturbed(config: Path) -> list[float]:
    """Losses of the run in one process."""
    assert launch(config.parent, "--config", config, "--cluster", "debug", "run.dir=alone").returncode == 0
    return losses(config.parent / "alone")


@pytest.fixture(scope="module")
def at_once(
    request: pytest.FixtureRequest,
    reachable_cluster: Cluster,
    config: Path,
    undisturbed: list[float],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future]]:
    """The module's SCENARIOS, started together: each mostly waits, for SLURM or for processes to start."""
    with ThreadPoolExecutor(len(request.module.SCENARIOS)) as threads:
        started = {}
        for scenario in request.module.SCENARIOS:
            directory = tmp_path_factory.mktemp(scenario.__name__)
            setting = Setting(reachable_cluster, config, undisturbed, directory)
            started[scenario.__name__] = threads.submit(scenario, setting)
        yield started
    reachable_cluster.run("scancel", "--user=root")
    reachable_cluster.wait_until_idle()
