"""How ranks leave their ends, and which of them the others follow from."""

import json
import pickle

import pytest

from caduceus.errors import Kind, NodeError, PeerError, RetryError, UserError, kind_of, of_rank
from caduceus.run.ends import ends_folder, first_cause, read_ends, record_end, record_end_here, recording_end

CASES = [
    (UserError("data.path: none"), Kind.USER, "data.path: none"),
    (NodeError("n3: no GPU"), Kind.NODE, "n3: no GPU"),
    (RetryError("run.dir: another process"), Kind.RETRY, "run.dir: another process"),
    (PeerError("rank 1 on n1 failed: KeyError: 3", 1, Kind.CRASH), Kind.PEER, "rank 1 on n1 failed: KeyError: 3"),
    (RuntimeError("rank 1: a worker\nwas killed"), Kind.CRASH, "RuntimeError: rank 1: a worker was killed"),
    (MemoryError(), Kind.CRASH, "MemoryError"),
    (KeyboardInterrupt(), Kind.CRASH, "KeyboardInterrupt"),
]


@pytest.mark.parametrize(("error", "kind", "message"), CASES, ids=lambda case: str(case)[:20])
def test_a_failure_is_left_by_its_type_and_passes_on(tmp_path, error, kind, message):
    folder = ends_folder(tmp_path, "7_1", 2)
    with pytest.raises(type(error)), recording_end(folder, 3):
        raise error
    end = read_ends(folder)[3]
    assert (end.rank, end.kind, end.message) == (3, kind, message)
    assert (end.peer, end.peer_kind) == ((1, Kind.CRASH) if kind is Kind.PEER else (None, None))


def test_a_rank_that_ends_by_itself_has_no_kind_and_none_other_has_a_file(tmp_path):
    with recording_end(tmp_path, 0):
        pass
    assert read_ends(tmp_path).keys() == {0} and read_ends(tmp_path)[0].kind is None
    assert read_ends(tmp_path / "of another attempt") == {} and first_cause({}) is None


def test_what_ends_the_process_at_once_leaves_its_end_first(tmp_path):
    record_end_here(TimeoutError("outside of a recording"))
    with recording_end(tmp_path, 2):
        record_end_here(TimeoutError("rank 2: step 3 has taken more than 5 minutes"))
        assert read_ends(tmp_path)[2].message == "TimeoutError: rank 2: step 3 has taken more than 5 minutes"


def test_an_end_that_no_disk_takes_hides_no_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="none"), recording_end(tmp_path / "file" / "ends", 0):
        raise UserError("data.path: none")


@pytest.mark.parametrize(
    ("errors", "cause"),
    [
        ([PeerError("lost"), None, RuntimeError("first"), RuntimeError("then")], 2),
        ([RuntimeError("of a lost node"), UserError("data.path: none")], 1),
        ([RetryError("in use"), PeerError("rank 0 failed", 0, Kind.RETRY)], 0),
        ([PeerError("rank 1", 1, Kind.NODE), NodeError("n1: no GPU"), RuntimeError("gloo")], 1),
        ([None, None], None),
    ],
)
def test_the_first_cause_goes_by_kind_and_then_by_time(tmp_path, errors, cause):
    for rank, error in enumerate(errors):
        record_end(tmp_path, rank, error)
    found = first_cause(read_ends(tmp_path))
    assert (found and found.rank) == cause


def test_errors_keep_their_facts_between_processes():
    error = pickle.loads(pickle.dumps(PeerError("rank 4 failed", 4, Kind.NODE)))
    assert (str(error), error.rank, error.peer_kind) == ("rank 4 failed", 4, Kind.NODE)
    assert json.loads(json.dumps({"kind": kind_of(error)})) == {"kind": "peer"}


@pytest.mark.parametrize(
    ("peer_kind", "status"), [(Kind.USER, 2), (Kind.NODE, 2), (Kind.RETRY, 2), (Kind.CRASH, 1), (None, 1)]
)
def test_a_rank_ends_with_the_status_of_the_one_that_failed(peer_kind, status):
    assert PeerError("rank 1 failed", 1, peer_kind).status == status


def test_of_an_error_of_one_rank_the_others_make_a_peer_s():
    error = NodeError("rank 2 on n2: its clock is wrong")
    assert of_rank(error, 2, rank=2) is error
    other = of_rank(error, 2, rank=0)
    assert (type(other), str(other), other.rank, other.peer_kind) == (PeerError, str(error), 2, Kind.NODE)
