"""A real SLURM on this machine, for tests: several nodes, fake GPUs, accounting; everything in one folder.

Debian's packages, started by hand: no systemd, no cgroups, nothing under /etc.  Each node is a slurmd of its own with a
name, a port and a spool folder; CPUs and memory are claimed, not owned, so that profiles for large machines can be
tried on a small one.  A fake GPU is a character device that nobody opens: SLURM counts it and sets
CUDA_VISIBLE_DEVICES.

    python tests/cluster/slurm.py        install it, and see whether it starts; else say why not, and exit with 1
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "mariadb-server"]
PROGRAMS = ["slurmctld", "slurmd", "slurmdbd", "munged", "sbatch", "mariadbd"]
NODES, CPUS, MEMORY = 2, 16, 200_000  # MEMORY in MB; CPUS and MEMORY of a node, claimed
DEVICES = ["/dev/null", "/dev/zero"]  # the fake GPUs of each node
PORT = 16817  # the first of those that are used
PATH = f"/usr/sbin:/sbin:{os.environ.get('PATH', '')}"


def missing() -> str | None:
    """Why SLURM can be neither found nor installed here; None where it can."""
    if all(shutil.which(program, path=PATH) for program in PROGRAMS):
        return None
    if os.geteuid() != 0:
        return "SLURM is not installed, and only root can install it"
    if not shutil.which("apt-get"):
        return "SLURM is not installed, and there is no apt-get to install it"
    return None


def install() -> None:
    """Install Debian's packages where they are not there yet."""
    if all(shutil.which(program, path=PATH) for program in PROGRAMS):
        return
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 240}
    quiet |= {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "update", "-qq"], **quiet)
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], **quiet)


class Slurm:
    """A cluster whose configuration, state and logs lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        self.daemons: list[subprocess.Popen] = []
        for name in ("bin", "etc", "log", "run", "db", "munge", "state", *(f"node-{n}" for n in range(1, NODES + 1))):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "PATH": f"{folder / 'bin'}:{PATH}",
            "OMP_WAIT_POLICY": "passive",  # jobs have more CPUs between them than this machine has
        }

    # ---- commands -------------------------------------------------------------------------------

    def run(self, *command: str) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """Every job so far, in the order of submission, by the fields of `sacct`."""
        fields = ["JobID", "JobName", "Comment", "State", "Partition", "ReqCPUS", "ReqMem", "TimelimitRaw", "NNodes"]
        said = self.run("sacct", "-X", "-n", "-P", "-a", "-S", "now-1day", "-o", ",".join([*fields, "ReqTRES"]))
        rows = [dict(zip([*fields, "ReqTRES"], line.split("|"), strict=True)) for line in said.splitlines()]
        return sorted(rows, key=lambda row: int(row["JobID"].split("_")[0]))

    def running(self, comment: str) -> list[str]:
        """Ids of the jobs of that comment which run now."""
        said = self.run("squeue", "-h", "-t", "RUNNING", "-o", "%A %k")
        return [line.split()[0] for line in said.splitlines() if line.split(maxsplit=1)[1].startswith(comment)]

    def queue(self) -> str:
        return self.run("squeue", "-h")

    # ---- start and stop -------------------------------------------------------------------------

    def start(self) -> None:
        self._configure()
        here, sock = self.folder, self.folder / "run/munge.sock"
        self._daemon("munged", "--foreground", *(["--force"] if os.geteuid() == 0 else []), f"--socket={sock}",
                     f"--key-file={here / 'munge/key'}", f"--pid-file={here / 'run/munged.pid'}",
                     f"--log-file={here / 'log/munged.log'}", f"--seed-file={here / 'munge/seed'}")  # fmt: skip
        wait_for(lambda: self.run("munge", f"--socket={sock}", "-n"), "munged")
        self._start_accounting()
        self._daemon("slurmctld", "-D", "-c")
        wait_for(lambda: "UP" in self.run("scontrol", "ping"), "slurmctld")
        for node in range(1, NODES + 1):
            self._daemon("slurmd", "-D", "-N", f"n{node}")
        wait_for(lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, "slurmd")

    def _start_accounting(self) -> None:
        here = self.folder
        if not (here / "db/mysql").is_dir():
            self.run("mariadb-install-db", "--no-defaults", f"--datadir={here / 'db'}", f"--user={self.user}",
                     "--auth-root-authentication-method=normal")  # fmt: skip
        client = ["--no-defaults", f"--socket={here / 'run/mysql.sock'}", "-u", "root"]
        self._daemon("mariadbd", "--no-defaults", f"--datadir={here / 'db'}", f"--socket={here / 'run/mysql.sock'}",
                     f"--user={self.user}", "--bind-address=127.0.0.1", f"--port={PORT + 3}", "--skip-name-resolve",
                     "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900")  # fmt: skip
        wait_for(lambda: self.run("mariadb-admin", *client, "ping"), "mariadbd")
        self.run("mariadb", *client, "-e", "CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'test'; "
                 "GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';")  # fmt: skip
        self._daemon("slurmdbd", "-D")
        wait_for(lambda: self.run("sacctmgr", "-n", "list", "cluster") is not None, "slurmdbd")
        for what in (("cluster", "test"), ("account", "test", "cluster=test"), ("user", self.user, "account=test")):
            if what[1] not in self.run("sacctmgr", "-n", "list", what[0], f"format={what[0]}").split():
                self.run("sacctmgr", "-i", "add", *what)

    def _daemon(self, *command: str) -> None:
        name = Path(command[0]).name
        with (self.folder / f"log/{name}-{len(self.daemons)}.out").open("w") as out:
            self.daemons.append(subprocess.Popen(command, stdout=out, stderr=out, env=self.environment))

    def stop(self) -> None:
        """End all jobs, then the daemons, last started first."""
        if self.daemons:
            subprocess.run(["scancel", "-u", self.user], env=self.environment, capture_output=True, timeout=60)
            time.sleep(2)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons = []

    # ---- configuration --------------------------------------------------------------------------

    def _configure(self) -> None:
        here, etc, host = self.folder, self.folder / "etc", socket.gethostname().split(".")[0]
        key = here / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (here / "munge").chmod(0o700)
        nodes = "\n".join(
            f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={PORT + 10 + n} CPUs={CPUS} "
            f"RealMemory={MEMORY} Gres=gpu:fake:{len(DEVICES)} State=UNKNOWN"
            for n in range(1, NODES + 1)
        )
        values = {"here": here, "user": self.user, "host": host, "nodes": nodes, "port": PORT}
        values |= {"dbd": PORT + 2, "sql": PORT + 3}
        (etc / "slurm.conf").write_text(CONTROLLER.format(**values))
        (etc / "slurmdbd.conf").write_text(ACCOUNTING.format(**values))
        (etc / "slurmdbd.conf").chmod(0o600)
        devices = [f"NodeName=n[1-{NODES}] Name=gpu Type=fake File={d} Flags=nvidia_gpu_env" for d in DEVICES]
        (etc / "gres.conf").write_text("\n".join(["AutoDetect=off", *devices, ""]))
        # Up to 22.05 a cgroup plugin is always loaded; v1 is harmless as long as nothing uses it.
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, env=self.environment).stdout
        old = version.split()[1].startswith(("20.", "21.", "22."))
        (etc / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n")
        # Snakemake's executor in a job drops SLURM_CONF before it calls srun.
        shim = here / "bin/srun"
        srun = shutil.which("srun", path=PATH)
        shim.write_text(f'#!/bin/sh\nSLURM_CONF={etc / "slurm.conf"} exec {srun} "$@"\n')
        shim.chmod(0o755)


def wait_for(found: Callable[[], object], what: str, seconds: float = 60, pause: float = 0.2) -> None:
    """Wait until `found` gives something true; an exception counts as not yet.

    Raises:
        TimeoutError: with the last exception, if it takes too long.
    """
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if found():
                return
        except (RuntimeError, OSError) as error:
            last = error
        time.sleep(pause)
    raise TimeoutError(f"{what}: not there after {seconds} s ({last})")


def main() -> None:
    if reason := missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        found = Slurm(Path(folder))
        try:
            install()
            found.start()
        except (subprocess.SubprocessError, RuntimeError, OSError) as error:
            raise SystemExit(f"SLURM cannot be installed and started here: {error}") from None
        finally:
            found.stop()


CONTROLLER = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={here}/run/munge.sock
CredType=cred/munge
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/node-%n
SlurmctldPidFile={here}/run/slurmctld.pid
SlurmdPidFile={here}/run/slurmd-%n.pid
SlurmctldLogFile={here}/log/slurmctld.log
SlurmdLogFile={here}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MinJobAge=600
KillWait=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd}
AccountingStoragePass={here}/run/munge.sock
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
GresTypes=gpu
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP
"""
ACCOUNTING = """AuthType=auth/munge
AuthInfo=socket={here}/run/munge.sock
DbdHost=localhost
DbdPort={dbd}
SlurmUser={user}
PidFile={here}/run/slurmdbd.pid
LogFile={here}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=test
StorageLoc=slurm_acct_db
"""

if __name__ == "__main__":
    main()
