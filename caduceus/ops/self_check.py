"""Checks that the Triton kernels compute on this card what their definition does.

Releases of compilers and drivers have silently corrupted forward passes on new cards. So every op runs once at small
sizes, forward and backward, and is compared with `naive` on the same card in fp64. A successful check is remembered
until the card, its driver, torch, Triton or the kernels change.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from caduceus import ops
from caduceus.devices import is_gpu
from caduceus.errors import UserError
from caduceus.files import fingerprint, locked, read_json, sha256_of, write_atomically

BOUNDS = {torch.float32: 3e-5, torch.bfloat16: 1.6e-2}
"""Largest error of an output or gradient, relative to its largest value; a wrong term has an error of order 1.

fp32: 24 bits, sums of hundreds of terms, exponentials exact to 2^-22. In bf16 results are rounded twice, by 2^-8 each,
where the partial sum over directions is stored in the output; the bound is twice that, as the interpreter truncates.
"""
ACTIVATIONS = {"u", "dt", "B", "C", "y", "z", "x", "halo"}
"""Operands that have the type of the case; the others are fp32."""
SIZES = 37, 20, 16
"""(tokens, channels, states) of the cases."""
WHOLE = 64, 256
"""(tokens, channels) of which nothing is left over: the kernels then take several in a turn and in a thread, and copy
ahead, as they do in a training.
"""
WAIT = 1800.0
"""Seconds that a process waits for the check of another one, before it checks itself. A check takes some minutes."""
_PAUSE = 0.5
_IGNORED = -100
_log = logging.getLogger(__name__)

Operands = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An op at one size: operands in fp64, and a function from a backend's name to the op."""

    name: str
    operands: Operands
    run: Callable[[str], Function]


def check_kernels(device: torch.device) -> None:
    """Compare every Triton op on `device` with its definition, unless this was done before. About seventy kernels are
    compiled for it, which takes some minutes of a processor; of the processes of a node one does it for all.

    Where the scan is right only without sums within a warp, it uses the other form from then on. Raises `UserError`,
    which names op, sizes and error, for the first wrong op.
    """
    machine = _machine(device)
    memory = _memory(machine)
    with _in_turn(memory, machine["card"]):
        known = _recall(memory)
        if known is None:
            _compare_all(device, machine)
            with suppress(OSError):  # the next start checks again
                memory.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(memory, json.dumps(machine, indent=1).encode())
        elif known.get("sums") == "tiles":
            _sum_in_tiles(machine)


@contextmanager
def _in_turn(memory: Path, card: str) -> Iterator[None]:
    """A context that one process at a time enters, as long as there is no memory of a check.

    So whoever waits finds the memory in the end. If the process before has died, or found an error, which it does not
    remember, the next one checks for itself. Where files cannot be locked, or after WAIT seconds, it does so at once.
    """
    began, is_waiting = time.monotonic(), False
    with ExitStack() as turn:
        while _recall(memory) is None and time.monotonic() - began < WAIT:
            try:
                memory.parent.mkdir(parents=True, exist_ok=True)
                turn.enter_context(locked(memory.with_suffix(".lock"), wait=False))
                break
            except BlockingIOError:
                if not is_waiting:
                    _log.info("ops: another process compares the Triton ops on %s; this one waits for it", card)
                is_waiting = True
                time.sleep(_PAUSE)
            except OSError:
                break
        yield


def _recall(memory: Path) -> dict[str, str] | None:
    """What a successful check has written; None where it is absent or damaged."""
    with suppress(OSError):
        known = read_json(memory)
        return known if isinstance(known, dict) else None
    return None


def _compare_all(device: torch.device, machine: dict[str, str]) -> None:
    began = time.monotonic()
    count = 0
    _log.info(
        "ops: the Triton ops are compared with their definitions on %s, whose first time takes minutes", machine["card"]
    )
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for case in _cases(device):
            for dtype in BOUNDS:
                _choose_sums(case, dtype, machine)
            count += 1
    _log.info(
        "ops: %d Triton ops are right on %s, forward and backward (%.1f s); not checked again until something changes",
        count,
        machine["card"],
        time.monotonic() - began,
    )


def differentiate(function: Function, operands: Operands) -> Operands:
    """{name: outputs and gradients}, for output gradients that every type represents exactly."""
    leaves = {n: t.detach().requires_grad_() for n, t in operands.items()}
    outputs = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    arriving = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), arriving)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


def error_of(found: Tensor, expected: Tensor) -> float:
    """The error relative to the largest value; infinite where a value is not a number, or the shape differs."""
    difference = (found.double() - expected).abs().max() if found.shape == expected.shape else torch.tensor(torch.inf)
    error = (difference / expected.abs().max().clamp(min=1e-30)).item() if difference else 0.0
    return error if error == error else torch.inf


def _choose_sums(case: Case, dtype: torch.dtype, machine: dict[str, str]) -> None:
    """Like `_require_right`, but where the scan is right only with its sums in tiles, it uses these from then on."""
    from caduceus.ops.triton import scan_launches

    try:
        _require_right(case, dtype, machine)
    except Exception:  # errors of the assembler too
        if dtype != torch.bfloat16 or not scan_launches.warp_sums:
            raise
        scan_launches.warp_sums = False
        try:
            _require_right(case, dtype, machine)
        except Exception:
            scan_launches.warp_sums = True
            raise
        machine["sums"] = "tiles"
        _sum_in_tiles(machine)


def _sum_in_tiles(machine: dict[str, str]) -> None:
    from caduceus.ops.triton import scan_launches

    _log.warning(
        "ops: the scan's sums within a warp are wrong on %s, so it uses sums in tiles, which are right but slower",
        machine["card"],
    )
    scan_launches.warp_sums = False


def _require_right(case: Case, dtype: torch.dtype, machine: dict[str, str]) -> None:
    operands = {n: t.to(dtype if n in ACTIVATIONS else torch.float32) for n, t in case.operands.items()}
    expected = differentiate(case.run("naive"), {n: t.double() for n, t in operands.items()})
    errors = {n: error_of(t, expected[n]) for n, t in differentiate(case.run("triton"), operands).items()}
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] < BOUNDS[dtype]:
        return
    raise UserError(
        f"ops.backend: the Triton kernels are wrong on {machine['card']} with torch {machine['torch']} and triton "
        f"{machine['triton']}: {case.name} in {str(dtype).removeprefix('torch.')}, {worst} is off by "
        f"{errors[worst]:.1e} of its largest value (at most {BOUNDS[dtype]:.1e}); install another release of triton, "
        "or choose ops.backend=naive, which is slow"
    )


def _cases(device: torch.device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    P, S, batch, K = 2, 2, 1, 4
    length, E, N = SIZES
    runs = (P, S, batch, length)

    def scanned(length: int, E: int) -> Operands:
        runs = (P, S, batch, length)
        return {
            "u": normal(*runs, E),
            "dt": normal(*runs, E) - 1,
            "A": -normal(P, E, N).abs() - 0.1,
            "B": normal(*runs, N),
            "C": normal(*runs, N),
            "D": normal(P, E),
            "z": normal(*runs[1:], E),
            "dt_bias": 0.1 * normal(P, E),
        }

    starts = torch.zeros(batch, length, dtype=torch.bool, device=device)
    starts[:, [0, length // 7, length // 2]] = True
    sizes = f"{length} tokens, {E} channels"
    scan = partial(_alone, ops.bidirectional_scan)
    of_scan = scanned(length, E)
    yield Case(f"scan ({sizes}, {N} states)", of_scan, scan)
    yield Case(f"scan of packed sequences ({sizes}, {N} states)", of_scan, partial(scan, starts=starts))
    of_scan = scanned(*WHOLE)
    for keep in (False, True):
        name = f"scan{' with kept states' * keep} ({WHOLE[0]} tokens, {WHOLE[1]} channels, {N} states)"
        yield Case(name, of_scan, partial(scan, keep=keep))
    convolved = {"x": normal(S, batch, length, E), "weight": normal(P, E, K), "bias": normal(P, E)}
    yield Case(f"convolution ({sizes}, {K} taps)", convolved, partial(_alone, ops.bidirectional_conv1d))
    normed = {"x": normal(S, batch, length, E), "residual": normal(S, batch, length, E), "weight": normal(E)}
    yield Case(f"add + RMSNorm ({sizes})", normed, partial(_pair, ops.add_norm, eps=1e-5))
    yield Case(f"add + LayerNorm ({sizes})", {**normed, "bias": normal(E)}, partial(_pair, ops.add_norm, eps=1e-5))
    gated = {"y": normal(*runs, E), "z": normal(*runs[1:], E), "weight": normal(P, E)}
    yield Case(f"gated RMSNorm ({sizes})", gated, partial(_alone, ops.gated_norm))
    heads, width = 2, E // 2
    chunked = {
        "x": normal(*runs, heads, width),
        "dt": normal(*runs, heads) - 1,
        "A": -normal(P, heads).abs() - 0.1,
        "B": normal(*runs, N),
        "C": normal(*runs, N),
        "D": normal(P, heads),
        "dt_bias": 0.1 * normal(P, heads),
    }
    chunks = partial(_alone, ops.bidirectional_ssd_scan)
    yield Case(f"Mamba-2's scan ({sizes}, {N} states)", chunked, chunks)
    yield Case(f"Mamba-2's scan of packed sequences ({sizes}, {N} states)", chunked, partial(chunks, starts=starts))
    labels = (torch.arange(length, device=device) % 16)[None]
    labels = torch.where(labels % 3 == 0, _IGNORED, labels)
    head = {"x": normal(S, batch, length, E), "weight": normal(S, 16, E)}
    yield Case(f"head + loss ({sizes})", head, partial(_loss, labels))


def _alone(op: Callable, backend: str, **fixed: Tensor | bool) -> Function:
    return lambda **operands: (op(**operands, **fixed, backend=backend),)


def _pair(op: Callable, backend: str, **fixed: float) -> Function:
    return lambda **operands: op(**operands, **fixed, backend=backend)


def _loss(labels: Tensor, backend: str) -> Function:
    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return ops.head_cross_entropy(x, weight, labels, ignore_label=_IGNORED, backend=backend)[:1]

    return run


def _machine(device: torch.device) -> dict[str, str]:
    """All facts on which the kernels' results may depend."""
    import triton

    version = Path("/proc/driver/nvidia/version")
    on_gpu = is_gpu(device)
    return {
        "card": torch.cuda.get_device_name(device) if on_gpu else "the interpreter",
        "capability": str(torch.cuda.get_device_capability(device)) if on_gpu else "",
        "driver": version.read_text().splitlines()[0] if on_gpu and version.exists() else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": fingerprint([sha256_of(path) for path in sorted((Path(__file__).parent / "triton").glob("*.py"))]),
    }


def _memory(machine: dict[str, str]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "caduceus" / f"kernels-{fingerprint(machine)[:24]}.json"
