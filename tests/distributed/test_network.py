"""The model of a network: what it must do whatever its numbers are, and what they are for large messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caduceus.distributed.costs import Exchange, Group
from caduceus.distributed.network import Network

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "broadcast")
NETWORK = Network()


def seconds(kind: str, size: int, nbytes: int, stride: int = 1) -> float:
    return NETWORK.seconds(Exchange(kind, "", Group("", size, stride), nbytes, 1))


@pytest.mark.parametrize(
    ("size", "stride", "bandwidth"),
    [(8, 1, 0.8 * 450e9), (64, 1, 0.8 * 400e9), (64, 8, 0.8 * 50e9), (2, 32, 0.8 * 50e9), (2, 4, 0.8 * 450e9)],
)
def test_much_goes_at_the_rate_of_the_narrowest_link(size: int, stride: int, bandwidth: float) -> None:
    """The eight ranks of a node send to others over eight adapters together; one rank of each node over its own."""
    nbytes = 10**10
    volume = nbytes * (size - 1) / size
    assert seconds("all-reduce", size, nbytes, stride) == pytest.approx(2 * volume / bandwidth, rel=0.03)
    assert seconds("reduce-scatter", size, nbytes, stride) == pytest.approx(volume / bandwidth, rel=0.03)
    assert seconds("all-gather", size, nbytes // size, stride) == pytest.approx(volume / bandwidth, rel=0.03)


@given(st.sampled_from(KINDS), st.integers(1, 9), st.integers(0, 10**9), st.integers(1, 10**9))
def test_more_bytes_or_more_ranks_take_no_less(kind: str, power: int, nbytes: int, more: int) -> None:
    assert seconds(kind, 2**power, nbytes) <= seconds(kind, 2**power, nbytes + more)
    assert seconds(kind, 2**power, nbytes) > 0
    few, many = (seconds(kind, size, nbytes) for size in (2**power, 2 ** (power + 1)))
    assert few <= many * 1.000001


def test_few_bytes_take_as_long_as_their_way() -> None:
    """To reduce a number, trees grow with the logarithm of the nodes; a ring of all ranks gathers with their number."""
    one, two, four = (seconds("all-reduce", 8 * nodes, 8) for nodes in (16, 32, 64))
    assert four - two == pytest.approx(two - one)
    assert seconds("all-gather", 512, 8) > 6 * seconds("all-reduce", 512, 8)
    assert seconds("all-reduce", 1, 10**9) == 0
