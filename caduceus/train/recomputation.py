"""Decisions by the free memory: `train.activation_checkpointing: auto` recomputes as few activations as the memory
requires, and `train.keep_states: auto` keeps states in as many blocks as it allows.
"""

import contextlib
import dataclasses
import logging
import math
import socket
from collections.abc import Iterator

import torch

from caduceus import CaduceusForMaskedLM
from caduceus.config import Config
from caduceus.distributed.footprint import REPLAYED, RESERVE, blocks_to_recompute
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.errors import UserError
from caduceus.model.block import residual_dtype
from caduceus.model.costs import kept_state_bytes
from caduceus.model.precision import autocast
from caduceus.train import memory

_log = logging.getLogger(__name__)


def recompute_to_fit(config: Config, strategy: Strategy) -> tuple[int, int]:
    """Set and return how many blocks of the model recompute their activations, and how many only the inputs of their
    scans.

    All ranks take the same numbers. It measures a micro-batch in which all blocks but the last are recomputed, and the
    memory that a block adds if it keeps more. The last block always keeps its activations: the backward pass would
    recompute it before it can free anything.
    """
    ranks, layers = strategy.ranks, config.model.n_layer
    model: CaduceusForMaskedLM = getattr(strategy.model, "module", strategy.model)
    free = memory.free_memory(ranks.device)
    model.recomputed_blocks, model.recomputed_scan_inputs = layers - 1, 0
    least = memory.peak_bytes(ranks.device, lambda: run_micro_batch(config, strategy))
    least += memory.moment_bytes_to_come(config, strategy)
    with refusing_what_is_too_large(config, ranks):
        added = bytes_added_by_a_block(config, ranks) if layers > 1 else (0, 0)
    rows = [[int(value) for value in row] for row in ranks.gather([least, *added, free]).tolist()]
    counts = [blocks_to_recompute(*row, layers=layers) for row in rows]
    whole, inputs = model.recomputed_blocks, model.recomputed_scan_inputs = max(counts)
    least, lean, full, free = rows[counts.index((whole, inputs))]
    if not ranks.is_main:
        return whole, inputs
    needed = least + inputs * lean + (layers - 1 - whole - inputs) * full
    sizes = [f"{count / 2**20:,.0f} MiB" for count in (needed, free, lean, full)]
    _log.info(
        "train.activation_checkpointing: auto recomputes %d of %d blocks, and of %d others what feeds the scan: a "
        "micro-batch and the optimizer then take %s of the %s that are free; a block that recomputes only the latter "
        "takes %s, and one that keeps all %s more than a recomputed one; %d %% stay in reserve",
        *(whole, layers, inputs, *sizes, round(100 * RESERVE)),
    )
    if needed > free:
        _log.warning(
            "this is more than the free memory; lower train.micro_batch or share sequences by parallel.context"
        )
    return whole, inputs


def keep_states_to_fit(config: Config, strategy: Strategy) -> int:
    """Set and return how many blocks of the model (the last ones) keep states of their scans; the same on all ranks.

    For `auto` it measures a micro-batch with the recomputation that was decided, and the blocks get the memory that is
    left.
    """
    ranks, model = strategy.ranks, strategy.network
    can_keep = config.ops.backend == "triton" and config.model.mixer == "mamba" and ranks.context == 1
    blocks = config.model.n_layer if can_keep and config.train.keep_states != "none" else 0
    if blocks and config.train.keep_states == "auto":
        free = memory.free_memory(ranks.device)
        needed = memory.peak_bytes(ranks.device, lambda: run_micro_batch(config, strategy))
        spare = int((1 - RESERVE) * free) - needed - memory.moment_bytes_to_come(config, strategy)
        bases = math.prod(micro_batch_shape(config, ranks)) * len(model.streams)
        most = max(0, spare) // (bases * kept_state_bytes(config.model, REPLAYED))
        blocks = int(ranks.gather([min(blocks, most)]).min())
    model.keep_states(blocks)
    return blocks


def bytes_added_by_a_block(config: Config, ranks: Ranks) -> tuple[int, int]:
    """Bytes that a block keeps of a micro-batch, beyond its input, which recomputing needs.

    The first number is for a block that recomputes what feeds the scan, the second for one that recomputes nothing.
    """
    with torch.device("meta"):
        small = dataclasses.replace(config.model, n_layer=1)
        model = CaduceusForMaskedLM(small, backend=config.ops.backend, strands=ranks.strand_group)
    model.share_sequences(ranks.context_group)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    block = model.blocks[0].to_empty(device=ranks.device).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    shape = (len(model.streams), *micro_batch_shape(config, ranks), config.model.d_model)
    with autocast(ranks.device, config.train.precision):
        with torch.no_grad():
            start = torch.zeros(shape, dtype=dtype, device=ranks.device)
            hidden, residual = block(start.to(residual_dtype(config.model, start)))
        inputs = hidden.requires_grad_(), residual.requires_grad_(), None, None
        lean, full = (
            sum(storage.nbytes() for storage in memory.kept_storages(block, *inputs, recompute_scan_inputs))
            for recompute_scan_inputs in (True, False)
        )
    return lean - residual.nbytes, full - residual.nbytes


def run_micro_batch(config: Config, strategy: Strategy) -> None:
    """Run forward and backward passes of a micro-batch in which all bases are labelled, without training anything.

    Where a step accumulates gradients, it runs two, since from the second one on gradients are in memory.
    """
    ranks, train = strategy.ranks, config.train
    tokens = torch.full(micro_batch_shape(config, ranks), config.model.vocabulary.bases[0], device=ranks.device)
    per_step = train.global_batch // (train.micro_batch * ranks.data_world)
    with refusing_what_is_too_large(config, ranks):
        for last in (False, True)[per_step == 1 :]:
            with strategy.accumulating(last):
                with autocast(ranks.device, train.precision):
                    output = strategy.model(tokens, tokens, None, return_logits=False)
                strategy.backward(output.loss_sum.sum() / tokens.numel())
    strategy.discard_gradients()


def micro_batch_shape(config: Config, ranks: Ranks) -> tuple[int, int]:
    """(sequences, bases) of a micro-batch on one rank."""
    return config.train.micro_batch, config.data.seq_len // ranks.context


@contextlib.contextmanager
def refusing_what_is_too_large(config: Config, ranks: Ranks) -> Iterator[None]:
    """A context in which a lack of GPU memory becomes a `UserError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise too_large(config, ranks, "a micro-batch does not fit into its memory") from None


def too_large(config: Config, ranks: Ranks, problem: str) -> UserError:
    remedy = "lower train.micro_batch or share sequences by parallel.context"
    if config.train.activation_checkpointing == "none":
        remedy += ", or set train.activation_checkpointing=auto"
    return UserError(f"rank {ranks.rank} on {socket.gethostname()}: {problem}; {remedy}")
