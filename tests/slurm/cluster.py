#!/usr/bin/env python3
"""A real SLURM cluster of four nodes with accounting, all on this machine, in a directory of its own.

    python tests/slurm/cluster.py start DIR      as root on Debian or Ubuntu; installs the packages that are missing
    eval "$(python tests/slurm/cluster.py env DIR)"
    sinfo
    python tests/slurm/cluster.py stop DIR

Nodes n0 … n3 have 4 CPUs, 4000 MB and 2 pretended GPUs each. Partition `main` is the default; a job in `urgent`
preempts (requeues) jobs of `main`. Time-outs are short, so that faults show within seconds. Nothing outside DIR is
touched but a line of /etc/hosts, which `stop` takes out again. Needs only the standard library.
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a program, it finds its package

from tests.slurm.packages import ClusterError, install_packages, why_impossible

NODES = ("n0", "n1", "n2", "n3")
CPUS_PER_NODE = 4
GPUS_PER_NODE = 2
HOSTS = Path("/etc/hosts")
HOSTS_MARK = "# slurm cluster in "
FIRST_PORT, LAST_PORT = 30000, 32767
LONGEST_DIRECTORY = 60  # a Unix socket's path has at most 107 bytes, and SLURM makes sockets below the directory

SLURM_CONF = Path(__file__).with_name("slurm.conf.in")
SLURMDBD_CONF = Path(__file__).with_name("slurmdbd.conf.in")


class Cluster:
    """The cluster in `directory`. Its daemons run in the foreground of sessions of their own; cluster.json has their
    process ids, so that any later process can stop them, and a fault can be made of one of them."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).resolve()
        self._record = self.directory / "cluster.json"

    @property
    def environment(self) -> dict[str, str]:
        """What a shell or process needs so that sbatch, sinfo and the others talk to this cluster."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def start(self) -> None:
        """Start the cluster afresh, or do nothing where it is already up. Raises `ClusterError`."""
        if reason := why_impossible():
            raise ClusterError(reason)
        if len(str(self.directory)) > LONGEST_DIRECTORY:
            raise ClusterError(f"{self.directory}: longer than {LONGEST_DIRECTORY} characters; choose a shorter path")
        if self._is_up():
            return
        if self.directory.exists() and any(self.directory.iterdir()) and not self._record.exists():
            raise ClusterError(f"{self.directory}: neither empty nor a cluster's directory; choose another one")
        install_packages()
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._write_files()
        self._add_hosts_line()
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the daemons and every job of this cluster, and take its line out of /etc/hosts. Only logs stay."""
        pids = [pid for name in self._pids() if (pid := self.pid_of(name)) is not None]
        for pid in [*pids, *self._job_processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._record.exists():
            _write_json(self._record, {})
        shutil.rmtree(self.directory / "database", ignore_errors=True)
        _edit_hosts(lambda line: HOSTS_MARK not in line or Path(line.split(HOSTS_MARK)[1]) != self.directory)

    def pid_of(self, name: str) -> int | None:
        """Process id of a daemon (munged, mariadbd, slurmdbd, slurmctld, or a node's name); None where it is dead."""
        pid, started = self._pids().get(name, (0, ""))
        return pid if pid and _start_time(pid) == started else None

    def kill(self, name: str) -> None:
        """`kill -9` of a daemon, as a crash would be. The jobs of a killed node keep running, as they would."""
        pid = self.pid_of(name)
        if pid is None:
            raise ClusterError(f"{name} is not running")
        os.kill(pid, signal.SIGKILL)
        _wait(lambda: self.pid_of(name) is None, f"{name} to die", seconds=60)

    def kill_node(self, node: str) -> None:
        """What a power cut does to a node: its slurmd and all that runs on it are gone at once."""
        self.kill(node)
        for pid in self._job_processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd (again)."""
        self._spawn(node, "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def start_controller(self) -> None:
        """Start slurmctld (again) and wait until it answers."""
        self._spawn("slurmctld", "slurmctld", "-D")
        self._wait_for(["scontrol", "ping"], "slurmctld", shows="is UP")

    def node_states(self) -> dict[str, str]:
        """State of each node as sinfo gives it: idle, mixed, allocated, down, drained, …; a '*' means no answer."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").split("\n")
        return dict(line.split() for line in lines if line)

    def wait_until_idle(self, seconds: float = 300) -> None:
        """Wait until all nodes are idle."""
        _wait(lambda: set(self.node_states().values()) == {"idle"}, "four idle nodes", seconds)

    def run(self, *command: str) -> str:
        """Run a command against this cluster and return its output."""
        result = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        if result.returncode:
            raise ClusterError(f"{' '.join(command)}: {result.stderr.strip()}")
        return result.stdout

    def _is_up(self) -> bool:
        daemons = ("munged", "mariadbd", "slurmdbd", "slurmctld", *NODES)
        return all(self.pid_of(name) is not None for name in daemons)

    def _write_files(self) -> None:
        for name in ("run", "log", "state", "spool", "database", "gpus"):
            (self.directory / name).mkdir(parents=True)
        for number in range(GPUS_PER_NODE):
            _make_null_device(self.directory / "gpus" / f"gpu{number}")
        slurmctld, slurmdbd, *slurmds = _free_ports(2 + len(NODES))
        values = {
            "directory": self.directory,
            "host": socket.gethostname(),
            "slurmctld": slurmctld,
            "slurmdbd": slurmdbd,
            "slurmds": f"[{','.join(map(str, slurmds))}]",
            "cpus": CPUS_PER_NODE,
            "gpus": GPUS_PER_NODE,
        }
        (self.directory / "slurm.conf").write_text(SLURM_CONF.read_text().format(**values))
        gres = f"NodeName=n[0-3] Name=gpu Flags=nvidia_gpu_env File={self.directory}/gpus/gpu[0-{GPUS_PER_NODE - 1}]\n"
        (self.directory / "gres.conf").write_text(gres)
        _write_private(self.directory / "slurmdbd.conf", SLURMDBD_CONF.read_text().format(**values).encode())
        _write_private(self.directory / "munge.key", os.urandom(128))
        _write_json(self._record, {})

    def _start_daemons(self) -> None:
        directory = self.directory
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={directory}/munge.key"),
            *(f"--socket={directory}/munge.socket", f"--pid-file={directory}/run/munged.pid"),
            *(f"--log-file={directory}/log/munged.log", f"--seed-file={directory}/munged.seed"),
        )
        datadir = f"--datadir={directory}/database"
        self.run("mariadb-install-db", "--no-defaults", "--user=root", datadir, "--skip-test-db")
        self._spawn(
            "mariadbd",
            *("mariadbd", "--no-defaults", "--user=root", datadir, "--skip-networking", "--skip-grant-tables"),
            *(f"--socket={directory}/mariadb.socket", f"--pid-file={directory}/run/mariadbd.pid"),
            *("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"),
        )
        ping = ["mariadb-admin", "--no-defaults", f"--socket={directory}/mariadb.socket", "ping"]
        self._wait_for(ping, "mariadbd", shows="alive")
        self._spawn("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=f"{directory}/mariadb.socket")
        # Accounting must know the cluster before slurmctld registers itself.
        self._wait_for(["sacctmgr", "--immediate", "add", "cluster", "onemachine"], "slurmdbd", shows="onemachine")
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def _spawn(self, name: str, *command: str, **environment: str) -> None:
        if self.pid_of(name) is not None:
            raise ClusterError(f"{name} is already running")
        with (self.directory / "log" / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                command,
                env=os.environ | self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
        _write_json(self._record, self._pids() | {name: [process.pid, _start_time(process.pid)]})

    def _pids(self) -> dict[str, tuple[int, str]]:
        return json.loads(self._record.read_text()) if self._record.exists() else {}

    def _wait_for(self, command: list[str], daemon: str, shows: str) -> None:
        def answers() -> bool:
            if self.pid_of(daemon) is None:
                log = (self.directory / "log" / f"{daemon}.out").read_text().strip().splitlines()
                raise ClusterError(f"{daemon} ended: {log[-1] if log else 'no output'}; see {self.directory}/log")
            result = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
            if "fatal: Unable to process configuration file" in result.stderr:
                raise ClusterError(result.stderr.splitlines()[0])
            return shows in result.stdout

        _wait(answers, f"{daemon}; see {self.directory}/log", seconds=300)

    def _job_processes(self, node: str | None = None) -> list[int]:
        """Step daemons and, after them, job processes of this cluster (of one node), known by their environment.

        A step daemon that outlived its job's processes would report their death as the job's own failure.
        """
        ours = f"SLURM_CONF={self.directory}/slurm.conf".encode()
        stepds, tasks = [], []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                is_stepd = (process / "cmdline").read_bytes().startswith(b"slurmstepd")
            except OSError:  # it ended meanwhile
                continue
            # A user's shell has SLURM_CONF, too; only what runs in a job has the name of its node besides.
            its_node = [entry[16:].decode() for entry in environment if entry.startswith(b"SLURMD_NODENAME=")]
            if ours in environment and its_node and node in (None, *its_node):
                (stepds if is_stepd else tasks).append(int(process.name))
        return stepds + tasks

    def _add_hosts_line(self) -> None:
        line = f"127.0.0.1 {' '.join(NODES)} {HOSTS_MARK}{self.directory}"
        _edit_hosts(_is_not_left_over, [line])


def _is_not_left_over(line: str) -> bool:
    """False for the line of a cluster that crashed or whose directory is gone."""
    if HOSTS_MARK not in line:
        return True
    return Cluster(line.split(HOSTS_MARK)[1]).pid_of("slurmctld") is not None


def _edit_hosts(keep: Callable[[str], bool], more: list[str] | None = None) -> None:
    """Rewrite /etc/hosts in place: in a container it is a mount, which cannot be renamed over."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        old = file.read()
        new = "".join(f"{line}\n" for line in [*filter(keep, old.splitlines()), *(more or [])])
        if new != old:
            file.seek(0)
            file.write(new)
            file.truncate()


def _free_ports(count: int) -> list[int]:
    """Ports that no connection is given before the daemons take them: below the ephemeral ones, above those of runs."""
    free = []
    for port in random.sample(range(FIRST_PORT, LAST_PORT + 1), LAST_PORT - FIRST_PORT + 1):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            free.append(port)
        if len(free) == count:
            return sorted(free)
    raise ClusterError(f"fewer than {count} of the ports {FIRST_PORT} to {LAST_PORT} are free")


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, so that a reused id is not taken for it; None if dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _make_null_device(path: Path) -> None:
    """SLURM takes nothing but a device file for a GPU."""
    os.mknod(path, 0o666 | stat.S_IFCHR, Path("/dev/null").stat().st_rdev)


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _write_json(path: Path, values: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)


def _wait(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "stop", "env"))
    parser.add_argument("directory", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.directory)
    try:
        if arguments.action == "start":
            cluster.start()
            print(f'four nodes are up; for a shell: eval "$(python {sys.argv[0]} env {arguments.directory})"')
        elif arguments.action == "stop":
            cluster.stop()
        else:
            print("\n".join(f"export {name}={value}" for name, value in cluster.environment.items()))
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
