"""What a dial (size=…, compute=…) decides, as a table before the run starts: keys, and time and memory by GPU."""

from caduceus.config import Config
from caduceus.model.costs import flops_per_base, parameter_count
from caduceus.train.estimate import estimate
from caduceus.train.roofline import PEAKS

GPUS = {"A100": (80, 2.04), "H100": (80, 3.35), "H200": (141, 4.8), "L40S": (48, 0.864)}
"""GB of memory, and its rate in TB per second, of each GPU, from its maker's data sheet."""


def dial_table(config: Config, world: int) -> str:
    """Lines with the keys that a dial decides, and estimates for `world` GPUs of each kind.

    Memory is that of one GPU. The time is an H100's, scaled by the rate of exponentials (which bound the scan) or of
    memory, whichever is lower in comparison.
    """
    model, train, bases = config.model, config.train, config.train.global_batch * config.data.seq_len
    flops = flops_per_base(model) * float(bases) * train.steps
    rates = {f"{train.lr * scale:.2g}": None for scale in (train.lr_scale or {}).values()}
    lines = [
        f"# {parameter_count(model):,} parameters: model.d_model={model.d_model}, model.n_layer={model.n_layer}",
        f"# {train.steps:,} steps of {train.global_batch} x {config.data.seq_len:,} = {bases:,} bases, "
        f"{bases * train.steps / 1e9:,.1f} billion in all, {flops:.2g} FLOP in matrix products",
        f"# train.lr={train.lr:g}, of matrices {', '.join(rates) or f'{train.lr:g}'}",
        f"# unmeasured estimates for {world} GPU{'s' * (world > 1)}:",
    ]
    found = estimate(config, world)
    for name, (gigabytes, bandwidth) in GPUS.items():
        behind = max(PEAKS["H100"].exponentials / PEAKS[name].exponentials, GPUS["H100"][1] / bandwidth)
        seconds = found.step_seconds * max(1.0, behind)
        fits = "fits" if found.memory_bytes < 0.9e9 * gigabytes else "DOES NOT FIT"
        lines.append(
            f"#   {name:5} {seconds:7.2f} s a step, {seconds * train.steps / 86400:6.1f} days; "
            f"{found.memory_bytes / 1e9:5.1f} of {gigabytes} GB, {fits}"
        )
    return "\n".join(lines)
