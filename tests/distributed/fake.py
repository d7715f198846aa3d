"""What a rank in a fake world needs of this suite."""

import torch
import torch.distributed as dist

from caduceus.distributed.ddp import DDP
from caduceus.distributed.strategy import Strategy

CPU = torch.device("cpu")


def meet_by_python(strategy: Strategy) -> None:
    """Have DDP reduce its buckets by a call from Python, as its own expects of a group what the fake one lacks."""

    def all_reduce(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        dist.all_reduce(bucket.buffer(), group=group)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    if isinstance(strategy, DDP):
        strategy.model.register_comm_hook(None, all_reduce)
