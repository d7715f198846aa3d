from collections.abc import Iterator

import pytest

from tests.slurm.cluster import NODES, Cluster, ClusterError, install_packages, why_impossible


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


@pytest.fixture
def slurm_cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The four-node cluster, idle, with this process's environment pointing at it."""
    for name, value in running_cluster.environment.items():
        monkeypatch.setenv(name, value)
    # A small machine runs several ranks: more threads than CPUs would only slow them.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield running_cluster
    for node in NODES:
        if running_cluster.pid_of(node) is None:
            running_cluster.start_node(node)
    running_cluster.run("scancel", "--user=root")
    running_cluster.wait_until_idle()
