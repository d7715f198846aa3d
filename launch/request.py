"""The request for a job: presets in configs/cluster/, command-line options, and the sbatch parameters that follow from
them.
"""

import argparse
import math
import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caduceus.errors import UserError
from caduceus.patience import patiently
from caduceus.presets import CONFIGS
from launch.scheduler import time_limit_seconds

PRESETS = CONFIGS / "cluster"
EXECUTORS = ("slurm", "local", "debug")
COUNTS = ("nodes", "spare", "gpus_per_node", "tasks_per_node", "cpus_per_task", "chain")
AS_IN_SBATCH = ("partition", "account", "qos", "constraint", "exclude", "reservation")
"""Keys that are options of sbatch and srun under the same names, and are passed on unchanged."""
TEXTS = ("mem", "time", *AS_IN_SBATCH, "python")
LISTS = {"setup": "LINE", "srun": "OPTION"}
PAIRS = {"sbatch": "KEY=VALUE", "env": "NAME=VALUE"}
_HELP = {
    "nodes": "machines of the job",
    "spare": "further nodes that the job holds idle, to replace one that fails",
    "gpus_per_node": "GPUs of each node",
    "tasks_per_node": "processes on each node; without it one per GPU, or one",
    "cpus_per_task": "processors of each process",
    "chain": "jobs submitted one after the other, where the cluster forbids requeueing",
    "mem": "memory of each node, such as 200G; 0 is all of it",
    "time": "time limit of one job, such as 24:00:00 or 2-0; 0 is none; the run goes on in further jobs",
    "exclude": "nodes not to use, as in sbatch",
    "python": "command that starts Python in the job, such as 'apptainer exec --nv image.sif python'",
    "setup": "shell line before the processes start, such as 'module load cuda'; may be given several times",
    "srun": "further option of srun; may be given several times",
    "sbatch": "further option of sbatch; may be given several times",
    "env": "environment variable of the processes; may be given several times",
}
"""What help says of the options; others are those of sbatch."""
_ALTERNATIVES = (("mem", "mem-per-cpu", "mem-per-gpu"), ("cpus-per-task", "cpus-per-gpu"))
"""Options of sbatch that exclude each other."""
_OPTIONS_OF_GPUS = ("gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task", "gres")
_SAID_OTHERWISE = {
    **{name: f"--{name}" for name in ("nodes", "cpus-per-task", "mem", "time", *AS_IN_SBATCH)},
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu"), "--nodes and --tasks-per-node"),
    **dict.fromkeys(("requeue", "no-requeue"), "the preset's key requeue, or --chain"),
    **dict.fromkeys(("output", "error", "open-mode"), "run.dir: the logs lie in RUN/logs"),
    **dict.fromkeys(("wrap", "test-only"), "--dry-run"),
    "no-kill": "--spare",
    "signal": "the preset's key signal_seconds",
    "job-name": "run.name=NAME",
    "array": "--sweep",
    "clusters": "the environment variable SLURM_CLUSTERS",
}
"""Options of sbatch that keys of the request decide -> how to set them."""


@dataclass
class JobRequest:
    """The request for a job. A preset is a YAML file of these keys; options of the command line override it."""

    executor: str = "slurm"
    """slurm | local (this machine, through submitit) | debug (one process, this one)."""
    nodes: int = 1
    spare: int = 0
    """Additional nodes that the job keeps idle: where one of its nodes fails, the run goes on with one of these."""
    gpus_per_node: int = 0
    gpu_request: str = "gpus-per-node"
    """How GPUs are requested: gpus-per-node | gres | none (where SLURM allocates whole nodes)."""
    gpu_type: str | None = None
    """Kind of GPU, such as h100, where the cluster has several."""
    tasks_per_node: int | None = None
    """Training processes on each node; null is one per GPU, or one."""
    cpus_per_task: int | None = None
    mem: str | None = None
    """Memory per node, such as 200G; 0 is all of it; null is the cluster's default."""
    time: str = "24:00:00"
    """Time limit of one job in SLURM's forms, 0 for none; a run goes on in further jobs until it is complete."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    requeue: bool = True
    """Put the job back into the queue after its time limit, preemption, the loss of a node, or a failure. Not in a
    chain.
    """
    chain: int = 1
    """Number of jobs that are submitted together, each of which goes on where the one before ended: for clusters that
    forbid requeueing.
    """
    max_failures: int = 3
    """Number of failures in a row, without a new checkpoint between them, after which the run is given up."""
    signal_seconds: int = 120
    """Seconds before the time limit at which the run is told to save and stop. Raise it where a checkpoint takes
    longer.
    """
    python: str | None = None
    """Command that starts Python in the job, such as `apptainer exec --nv image.sif python`; null is this Python."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the processes start, such as `module load cuda`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the processes."""
    srun: list[str] = field(default_factory=list)
    """Further options of srun, such as `--container-image=IMAGE` (Pyxis)."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, such as `exclusive: true` or `mail-type: END`; `false` leaves one out."""

    @property
    def processes_per_node(self) -> int:
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def allocated_nodes(self) -> int:
        return self.nodes + self.spare

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.processes_per_node

    @property
    def requeues(self) -> bool:
        """Whether a job goes back into the queue; in a chain the next job goes on instead."""
        return self.requeue and self.chain == 1

    @property
    def minutes(self) -> float:
        """The time limit; infinite where there is none."""
        return parse_time(self.time)


def load_request(name: str, options: dict[str, Any]) -> JobRequest:
    """The preset configs/cluster/NAME.yaml, or the user's own YAML file, with `options` on top.

    Raises `UserError` naming the file or key for anything that is not a valid request.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    try:
        preset = patiently(lambda: OmegaConf.load(path))
    except FileNotFoundError:
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise UserError(f"--cluster: there is no preset {path}; choose {known}, or give a YAML file") from None
    except Exception as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(preset):
        raise UserError(f"{path}: a preset is a mapping of keys, such as 'nodes: 2'")
    if not isinstance(preset.get("time", ""), str):
        # YAML reads 24:00:00 without quotes as a number of seconds, SLURM a number as minutes.
        raise UserError(f"{path}: time: write it in quotes, such as '24:00:00'")
    try:
        request = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JobRequest), preset))
        request = OmegaConf.to_object(OmegaConf.merge(_without_replaced(request, options), options))
    except OmegaConfBaseException as error:
        known = ", ".join(key.name for key in fields(JobRequest))
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: {error.full_key or 'value'}: {reason}; known keys: {known}") from None
    check_request(request)
    return request


def check_request(request: JobRequest) -> None:
    """Raise `UserError`, which names the key, for an impossible request."""
    if request.executor not in EXECUTORS:
        raise UserError(f"executor: choose one of {', '.join(EXECUTORS)}; got '{request.executor}'")
    if request.gpu_request not in ("gpus-per-node", "gres", "none"):
        raise UserError(f"gpu_request: choose gpus-per-node, gres or none; got '{request.gpu_request}'")
    least = {"nodes": 1, "spare": 0, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "signal_seconds": 0}
    least |= {"chain": 1, "max_failures": 1}
    for key, smallest in least.items():
        value = getattr(request, key)
        if value is not None and value < smallest:
            raise UserError(f"{key}: must be at least {smallest}, got {value}")
    if request.gpus_per_node and request.processes_per_node > request.gpus_per_node:
        raise UserError(
            f"tasks_per_node: {request.processes_per_node} processes cannot share a node's {request.gpus_per_node} GPUs"
        )
    _check_sbatch_options(request)
    if request.executor == "local" and request.nodes > 1:
        raise UserError(
            f"nodes: this machine is one node, not {request.nodes}; for more processes use --tasks-per-node"
        )
    if request.executor == "debug" and request.world > 1:
        raise UserError(f"nodes: debug runs in this process alone, not in {request.world}; use --cluster local")
    if request.executor != "slurm" and request.spare:
        raise UserError(f"spare: only a SLURM job can have spare nodes, but the executor is {request.executor}")
    if request.minutes * 60 <= request.signal_seconds:
        raise UserError(
            f"time: {request.minutes} minutes leave no time beyond the {request.signal_seconds} s that are reserved "
            "for the last checkpoint; raise the time or lower signal_seconds"
        )


def _without_replaced(preset: JobRequest, options: dict[str, Any]) -> JobRequest:
    """The preset without keys that an option replaces in another form, such as `mem` where --sbatch mem-per-gpu is
    given.
    """
    given = {name.replace("_", "-") for name in (*options, *options.get("sbatch", {}))}
    replaced = {name for names in _ALTERNATIVES if given & {*names} for name in names} - given
    keys = {name.replace("-", "_"): None for name in replaced if hasattr(preset, name.replace("-", "_"))}
    sbatch = {name: value for name, value in preset.sbatch.items() if _plain(name) not in replaced}
    return replace(preset, **keys, sbatch=sbatch)


def _check_sbatch_options(request: JobRequest) -> None:
    """Raise `UserError` for an option of sbatch that is given twice, or that contradicts the request."""
    further = _sbatch_options(request)
    asked = [*further, *(name for name in ("mem", "cpus-per-task") if getattr(request, name.replace("-", "_")))]
    for names in _ALTERNATIVES:
        if len(both := sorted({*names} & {*asked})) > 1:
            raise UserError(f"sbatch: {' and '.join(both)} exclude each other; keep one of them")
    for name in further:
        if way := _SAID_OTHERWISE.get(name):
            raise UserError(f"sbatch: {name}: is set by {way}")
        is_of_gpus = name in _OPTIONS_OF_GPUS and (name != "gres" or "gpu" in str(further["gres"]))
        if is_of_gpus and request.gpu_request != "none":
            raise UserError(
                f"sbatch: {name}: request GPUs by gpus_per_node, gpu_type and gpu_request (gpus-per-node or gres); "
                "this option goes only with gpu_request: none"
            )
    if request.chain > 1 and "dependency" in further:
        raise UserError("sbatch: dependency: each job of a chain depends on the one before; submit without --chain")


def _sbatch_options(request: JobRequest) -> dict[str, Any]:
    """The further options of sbatch, without those of the value false or null, which switch an option of the preset
    off.
    """
    return {_plain(name): value for name, value in request.sbatch.items() if value is not None and value is not False}


def _plain(name: str) -> str:
    """The name of an option of sbatch, however a preset writes it."""
    return name.lstrip("-").replace("_", "-")


def parse_time(text: str) -> float:
    """Minutes, rounded up, of a time limit in SLURM's forms; 0, UNLIMITED and INFINITE mean no limit, as in SLURM."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    try:
        seconds = time_limit_seconds(text)
    except ValueError:
        raise UserError(
            f"time: '{text}' is not a time limit; write minutes, H:M:S or D-H:M:S, such as 24:00:00, or 0 for no limit"
        ) from None
    return -(-seconds // 60) or math.inf


def sbatch_parameters(request: JobRequest, job_name: str) -> dict[str, Any]:
    """The request as parameters of submitit's SlurmExecutor (`update_parameters`)."""
    parameters: dict[str, Any] = {
        "job_name": job_name,
        "nodes": request.allocated_nodes,
        "ntasks_per_node": request.processes_per_node,
        "time": 0 if math.isinf(request.minutes) else request.minutes,
        "signal_delay_s": request.signal_seconds,
        "wckey": None,  # submitit adds this key, which a cluster that checks keys refuses
        "stderr_to_stdout": True,
        "setup": _setup_lines(request),
        "srun_args": ["--kill-on-bad-exit=1", *_without_spare(request), *request.srun],
    }
    for key in ("cpus_per_task", "mem"):
        if (value := getattr(request, key)) is not None:
            parameters[key] = value
    further: dict[str, Any] = {"requeue" if request.requeues else "no-requeue": True}
    if request.spare:
        further["no-kill"] = True
    further |= {name: value for name in AS_IN_SBATCH if (value := getattr(request, name))}
    if request.gpus_per_node and request.gpu_request != "none":
        gpus = ":".join(filter(None, [request.gpu_type, str(request.gpus_per_node)]))
        further[request.gpu_request] = f"gpu:{gpus}" if request.gpu_request == "gres" else gpus
    sbatch = _sbatch_options(request)
    if "gres" in further and "gres" in sbatch:
        sbatch["gres"] = f"{further['gres']},{sbatch['gres']}"
    return {**parameters, "additional_parameters": {**further, **sbatch}}


def add_request_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --cluster and an option per key of a preset; options that are not given are None."""
    presets = f"a preset of configs/cluster/ such as slurm, local or debug, or a YAML file (default: {default})"
    parser.add_argument("--cluster", default=default, metavar="PRESET", help=presets)
    request = parser.add_argument_group("the request", "Each option overrides the preset's key of the same name.")
    for name in COUNTS:
        request.add_argument(_option(name), type=int, metavar="N", help=_HELP[name])
    for name in TEXTS:
        request.add_argument(_option(name), metavar=name.upper(), help=_HELP.get(name, "as in sbatch"))
    for name, what in (LISTS | PAIRS).items():
        request.add_argument(_option(name), action="append", metavar=what, help=_HELP[name])


def requested_job(arguments: argparse.Namespace) -> JobRequest:
    """The preset, with the given options on top."""
    given = {name: getattr(arguments, name) for name in (*COUNTS, *TEXTS, *LISTS, *PAIRS)}
    given = {name: value for name, value in given.items() if value is not None}
    options = {name: dict(_pairs(name, value)) if name in PAIRS else value for name, value in given.items()}
    return load_request(arguments.cluster, options)


def _setup_lines(request: JobRequest) -> list[str]:
    lines = list(request.setup)
    lines += [f"export {name}={shlex.quote(value)}" for name, value in request.env.items()]
    if request.cpus_per_task is not None:
        # Since SLURM 22.05 srun does not inherit sbatch's --cpus-per-task: a process would get a single CPU.
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    return lines


def _without_spare(request: JobRequest) -> list[str]:
    """Options of srun for a step that leaves the spare nodes idle."""
    return [f"--nodes={request.nodes}", f"--ntasks={request.world}"] if request.spare else []


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _pairs(name: str, texts: list[str]) -> list[tuple[str, Any]]:
    pairs = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or (name == "env" and not equals):
            raise UserError(f"--{name} {text}: expected {PAIRS[name]}")
        pairs.append((key.lstrip("-"), value if equals else True))
    return pairs
