"""Where a run goes and what it asks for: presets in configs/cluster/, and the sbatch parameters that follow."""

import math
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caduceus.errors import UserError

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "cluster"
EXECUTORS = ("slurm", "local", "debug")


@dataclass
class Cluster:
    """What a job asks for. A preset is a YAML file of these keys; options of the command line win over it."""

    executor: str = "slurm"
    """slurm | local (this machine, through submitit) | debug (one process, this one)."""
    nodes: int = 1
    gpus_per_node: int = 0
    gpu_request: str = "gpus-per-node"
    """How GPUs are asked for: gpus-per-node | gres | none (where whole nodes are given out)."""
    gpu_type: str | None = None
    """Kind of GPU, such as h100, where the cluster has several."""
    tasks_per_node: int | None = None
    """Training processes on each node; null is one per GPU, or one."""
    cpus_per_task: int | None = None
    mem: str | None = None
    """Memory per node, such as 200G; 0 is all of it; null is the cluster's default."""
    time: str = "24:00:00"
    """Limit of one job in SLURM's forms; a run goes on in further jobs until it is finished."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    requeue: bool = True
    """Put the job back into the queue after its time limit, preemption, the loss of a node, or a failure."""
    chain: int = 1
    """Jobs submitted at once, each of which goes on where the one before ended: where requeueing is forbidden."""
    max_failures: int = 3
    """Failures in a row without a new checkpoint between them after which the run is given up."""
    signal_seconds: int = 120
    """How long before the time limit the run is told to save and stop. Raise it where a checkpoint takes longer."""
    python: str | None = None
    """Command that starts Python in the job, such as `apptainer exec --nv image.sif python`; null is this Python."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the processes start, such as `module load cuda`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the processes."""
    srun: list[str] = field(default_factory=list)
    """Further options of srun, such as `--container-image=IMAGE` (Pyxis)."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, such as `exclusive: true` or `mail-type: END`."""

    @property
    def processes_per_node(self) -> int:
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.processes_per_node

    @property
    def requeues(self) -> bool:
        """Whether a job goes back into the queue; in a chain the next one goes on instead."""
        return self.requeue and self.chain == 1

    @property
    def minutes(self) -> int:
        return parse_time(self.time)


def load_cluster(name: str, options: dict[str, Any]) -> Cluster:
    """The preset configs/cluster/NAME.yaml, or a YAML file of one's own, with `options` on top.

    Raises `UserError` naming the file or key for anything that is not a valid request.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    try:
        preset = OmegaConf.load(path)
    except FileNotFoundError:
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise UserError(f"--cluster: no preset {path}; choose {known}, or give a YAML file") from None
    except Exception as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(preset):
        raise UserError(f"{path}: a preset is a mapping of keys, such as 'nodes: 2'")
    if not isinstance(preset.get("time", ""), str):
        # YAML reads 24:00:00 without quotes as a number of seconds, SLURM a number as minutes.
        raise UserError(f"{path}: time: write it in quotes, such as '24:00:00'")
    try:
        cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Cluster), preset, options))
    except OmegaConfBaseException as error:
        known = ", ".join(key.name for key in fields(Cluster))
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: {error.full_key or 'value'}: {reason}; known keys: {known}") from None
    check_cluster(cluster)
    return cluster


def check_cluster(cluster: Cluster) -> None:
    """Raise `UserError` naming the key where a request cannot be meant."""
    if cluster.executor not in EXECUTORS:
        raise UserError(f"executor: choose one of {', '.join(EXECUTORS)}; got '{cluster.executor}'")
    if cluster.gpu_request not in ("gpus-per-node", "gres", "none"):
        raise UserError(f"gpu_request: choose gpus-per-node, gres or none; got '{cluster.gpu_request}'")
    least = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "signal_seconds": 0}
    least |= {"chain": 1, "max_failures": 1}
    for key, smallest in least.items():
        value = getattr(cluster, key)
        if value is not None and value < smallest:
            raise UserError(f"{key}: must be at least {smallest}, got {value}")
    if cluster.gpus_per_node and cluster.processes_per_node > cluster.gpus_per_node:
        raise UserError(
            f"tasks_per_node: {cluster.processes_per_node} processes cannot share a node's {cluster.gpus_per_node} GPUs"
        )
    if cluster.executor == "local" and cluster.nodes > 1:
        raise UserError(f"nodes: this machine is one, not {cluster.nodes}; for more processes use --tasks-per-node")
    if cluster.executor == "debug" and cluster.world > 1:
        raise UserError(f"nodes: debug runs in this one process, not in {cluster.world}; use --cluster local")
    if cluster.minutes * 60 <= cluster.signal_seconds:
        raise UserError(
            f"time: of {cluster.minutes} minutes nothing is left after the {cluster.signal_seconds} s that are kept "
            "for the last checkpoint; raise the time or lower signal_seconds"
        )


def parse_time(text: str) -> int:
    """Minutes, rounded up, of a time limit in SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise UserError(f"time: '{text}' is not a time limit; write minutes, H:M:S or D-H:M:S, such as 24:00:00")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = parts + [0] * (3 - len(parts))
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, parts + [0] * (2 - len(parts))
    return -(-(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds) // 60)


def sbatch_parameters(cluster: Cluster, job_name: str) -> dict[str, Any]:
    """The request as submitit's SlurmExecutor takes it (`update_parameters`)."""
    parameters: dict[str, Any] = {
        "job_name": job_name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.processes_per_node,
        "time": cluster.minutes,
        "signal_delay_s": cluster.signal_seconds,
        "wckey": None,  # submitit's own key, which a cluster with checked keys refuses
        "stderr_to_stdout": True,
        "setup": _setup_lines(cluster),
        "srun_args": ["--kill-on-bad-exit=1", *cluster.srun],
    }
    for key in ("cpus_per_task", "mem", "partition", "account", "qos", "constraint", "exclude"):
        if (value := getattr(cluster, key)) is not None:
            parameters[key] = value
    further: dict[str, Any] = {"requeue" if cluster.requeues else "no-requeue": True}
    if cluster.reservation:
        further["reservation"] = cluster.reservation
    if cluster.gpus_per_node and cluster.gpu_request != "none":
        gpus = ":".join(filter(None, [cluster.gpu_type, str(cluster.gpus_per_node)]))
        further[cluster.gpu_request] = f"gpu:{gpus}" if cluster.gpu_request == "gres" else gpus
    return {**parameters, "additional_parameters": {**further, **cluster.sbatch}}


def slurm_complaint(cluster: Cluster) -> str | None:
    """What this machine's SLURM would refuse in the request, in one line; None where nothing is seen to be wrong."""
    if shutil.which("sbatch") is None:
        return "no SLURM on this machine (sbatch not found); to run here use --cluster local"
    try:
        rows = [line.split("|") for line in _sinfo("%P|%G|%l")]
    except subprocess.CalledProcessError as error:
        return f"SLURM does not answer ({last_line(error.stderr)}); to run on this machine use --cluster local"
    names = sorted({name.removesuffix("*") for name, _, _ in rows})
    chosen = [row for row in rows if row[0].endswith("*")]
    if cluster.partition is not None:
        for wanted in cluster.partition.split(","):
            if wanted not in names:
                return f"partition: no partition '{wanted}' here; choose one of {', '.join(names)}"
        rows = chosen = [row for row in rows if row[0].removesuffix("*") in cluster.partition.split(",")]
    most = max((_gpus_of(gres, cluster.gpu_type) for _, gres, _ in rows), default=0)
    if cluster.gpus_per_node > most and cluster.gpu_request != "none":
        kind = f"{cluster.gpu_type} GPUs" if cluster.gpu_type else "GPUs"
        return f"gpus_per_node: {cluster.gpus_per_node} {kind} asked for, but a node has at most {most}"
    limits = [(_limit(limit), limit) for _, _, limit in chosen]
    # A quality of service may lift the partition's limit.
    if limits and cluster.qos is None and cluster.minutes > max(limits)[0]:
        return f"time: {cluster.time} asked for, but the partition's limit is {max(limits)[1]}"
    return None


def test_submission(script: Path) -> str | None:
    """What `sbatch --test-only` objects to in a batch script, in one line; None where it would be accepted."""
    result = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    return f"SLURM refuses the job: {last_line(result.stderr)}"


def is_live(job: str) -> bool:
    """Whether a job waits or runs; of a job that SLURM does not speak of, for want of an answer, it does."""
    if shutil.which("squeue") is None:
        return True
    result = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True)
    forgotten = "Invalid job id" in result.stderr
    return bool(result.stdout) or (result.returncode != 0 and not forgotten)


def end_of(job: str) -> str:
    """What SLURM tells of a job that neither waits nor runs, in words that follow the job's name."""
    for command in (
        ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"],
        ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State"],
    ):
        if shutil.which(command[0]):
            told = subprocess.run(command, capture_output=True, text=True).stdout.split()
            if told and told[0] not in ("RUNNING", "PENDING"):  # accounting may not know of the end
                return f"ended as {told[0]}"
    return "is no longer known to SLURM"


def _setup_lines(cluster: Cluster) -> list[str]:
    lines = list(cluster.setup)
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    if cluster.cpus_per_task is not None:
        # Since SLURM 22.05 srun does not take over sbatch's --cpus-per-task: a process would get a single CPU.
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    return lines


def _sinfo(columns: str) -> list[str]:
    command = ["sinfo", "--noheader", f"--format={columns}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _limit(text: str) -> float:
    """Minutes of a partition's limit as sinfo prints it."""
    return parse_time(text) if text[:1].isdigit() else math.inf


def _gpus_of(gres: str, kind: str | None) -> int:
    """GPUs in a node's generic resources, such as `gpu:h100:8(S:0-1),nvme:1`."""
    found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", gres)
    return sum(int(count) for its_kind, count in found if kind is None or its_kind == kind)


def last_line(text: str) -> str:
    """What a command of SLURM said last, without its prefixes."""
    lines = text.strip().splitlines()
    return (
        lines[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ") if lines else "no reason given"
    )
