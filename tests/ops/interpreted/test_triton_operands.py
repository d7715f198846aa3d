from tests.ops.empty import check_empty_sequences


def test_an_empty_sequence_has_empty_results():
    check_empty_sequences("triton")
