import pytest
import torch

from caduceus.ops import bidirectional_conv1d, bidirectional_scan


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_packed_sequences_give_what_each_gives_alone(backend):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    P, S, L, E, N, K = 2, 2, 11, 4, 3, 4
    x, weight, bias = normal(S, 2, L, E), normal(P, E, K), normal(P, E)
    dt, A, B, C = normal(P, S, 2, L, E), -normal(P, E, N).abs(), normal(P, S, 2, L, N), normal(P, S, 2, L, N)
    starts = torch.zeros(2, L, dtype=torch.bool)
    starts[0, [0, 3, 4]] = True
    starts[1, 9] = True

    def mix(x, dt, B, C, starts=None):
        u = bidirectional_conv1d(x, weight, bias, starts=starts, backend=backend)
        return bidirectional_scan(u, dt, A, B, C, z=x, starts=starts, backend=backend)

    packed = mix(x, dt, B, C, starts)
    for b, i, j in [(0, 0, 3), (0, 3, 4), (0, 4, L), (1, 0, 9), (1, 9, L)]:
        alone = mix(*(t[..., b, None, i:j, :] for t in (x, dt, B, C)))
        torch.testing.assert_close(packed[:, b, None, i:j], alone, rtol=1e-12, atol=1e-12)
