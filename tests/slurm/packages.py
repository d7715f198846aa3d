"""The Debian packages of a SLURM cluster, and whether one can run here."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {
    # package: (what it brings, services that its installation would enable)
    "munge": ("/usr/sbin/munged", ("munge",)),
    "slurm-wlm": ("/usr/sbin/slurmctld", ("slurmctld", "slurmd")),
    "slurmdbd": ("/usr/sbin/slurmdbd", ("slurmdbd",)),
    "mariadb-server": ("/usr/sbin/mariadbd", ("mariadb",)),
}


class ClusterError(Exception):
    """The cluster cannot run here, or did not start. The message is one line."""


def why_impossible() -> str | None:
    """Why no cluster can run on this machine; None where it can."""
    if sys.platform != "linux":
        return "SLURM runs on Linux only"
    if os.geteuid() != 0:
        return "starting a SLURM cluster needs root"
    missing = _missing_packages()
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} not installed, and there is no apt-get to install them"
    return None


def install_packages() -> None:
    """Install what is missing by apt-get, without letting the packages start or enable their services."""
    missing = _missing_packages()
    if not missing:
        return
    print(f"installing {', '.join(missing)}", file=sys.stderr)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet=2", "--no-install-recommends", *missing]
    with _no_service_starts():
        for command in (["apt-get", "update", "--quiet=2"], install):
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if result.returncode:
                last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
                raise ClusterError(f"{' '.join(command)} failed: {''.join(last)}")
    if shutil.which("systemctl"):
        services = [service for package in missing for service in PACKAGES[package][1]]
        subprocess.run(["systemctl", "--quiet", "disable", *services], capture_output=True)


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Debian's policy hook, which packages ask before they start a service; a machine's own one is respected."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def _missing_packages() -> list[str]:
    return [package for package, (binary, _) in PACKAGES.items() if not Path(binary).exists()]
