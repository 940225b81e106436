"""A real Slurm in one folder: two nodes of two processors and two fake GPUs, a low and a high partition.

Needs root, and from Debian slurmctld slurmd slurm-client munge; for accounting slurmdbd and mariadb-server too.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "runuser")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
NODES = ("n1", "n2")


def missing(accounting: bool = False) -> str | None:
    """Why no cluster can be started here, if so."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    wanted = (*PROGRAMS, *(ACCOUNTING if accounting else ()))
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in wanted if shutil.which(name, path=path) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


# Seconds: a scheduler on a loaded machine takes minutes where it takes seconds else.
PATIENCE = 600


def wait_for(what: str, holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until it holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"after {seconds} s still not: {what}"
        time.sleep(0.25)


class Cluster:
    """Start with `start`, end with `stop`. `conf` is for SLURM_CONF."""

    def __init__(self, accounting: bool = False) -> None:
        # Not in pytest's folder: it is closed to other users, of which munge is one.
        self.root, self.accounting = Path(tempfile.mkdtemp(prefix="slurm-")), accounting
        self.conf = self.root / "slurm.conf"
        self.ports = _free_ports(5)
        self.env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def start(self) -> None:
        """Returns once both nodes take jobs."""
        for name in ("state", "spool/n1", "spool/n2", "log", "run", "dev", "munge"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)  # for munge's user, and the database's
        self._start_munge()
        for number in (0, 1):  # Slurm wants a device file for a GPU: a copy of /dev/null is one
            os.mknod(self.root / "dev" / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        gpus = f"{self.root}/dev/gpu[0-1]"
        (self.root / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu Type=a100 File={gpus}\n")
        if self.accounting:
            self._start_accounting()
        self.conf.write_text(self._config())
        self._start_daemons()

    def start_again(self) -> None:
        """Kill every daemon and start as if for the first time: job ids begin at 1 again."""
        # What is left of a job would tell the new controller that its job of that id is over.
        wait_for("an empty queue", lambda: not self.ask("squeue", "-h"))
        self.kill_jobs()
        for daemon in ("slurmctld", *(f"slurmd-{node}" for node in NODES)):
            self.kill(daemon)
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            shutil.rmtree(self.root / name)
            (self.root / name).mkdir()
        self._start_daemons()

    def wait_until_idle(self) -> None:
        """Returns once both nodes take jobs."""
        wait_for("both nodes idle", lambda: self.ask("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == "2")

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._run("slurmd", "-N", node, "-f", str(self.conf))

    def kill(self, daemon: str) -> None:
        """Kill a daemon outright: slurmctld, or slurmd-n1."""
        pid = self._pid(f"run/{daemon}.pid")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(f"{daemon} gone", lambda: not Path(f"/proc/{pid}").exists() or _zombie(pid), 20)

    def kill_jobs(self) -> None:
        """Kill all that runs of jobs, and Slurm's own processes around them: as if their nodes had died."""
        ours = f"SLURM_CONF={self.conf}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (process / "environ").read_bytes().split(b"\0")
                of_a_job = any(each.startswith(b"SLURM_JOB_ID=") for each in environment)
                if ours in environment and (of_a_job or (process / "comm").read_text().startswith("slurmstepd")):
                    os.kill(int(process.name), signal.SIGKILL)

    def ask(self, *command: str) -> str:
        """What a command of Slurm's prints, without the spaces around it; nothing if it fails."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout.strip()

    def stop(self) -> None:
        """End what was started, by the process ids that it wrote."""
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=20)
            wait_for("an empty queue", lambda: not self.ask("squeue", "-h"), 20)
        names = ["run/slurmd-n1.pid", "run/slurmd-n2.pid", "run/slurmctld.pid", "run/slurmdbd.pid", "run/db/my.pid"]
        for pid in map(self._pid, [*names, "munge/pid"]):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        shutil.rmtree(self.root, ignore_errors=True)

    def _start_daemons(self) -> None:
        self._run("slurmctld", "-c", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def _pid(self, name: str) -> int | None:
        try:
            return int((self.root / name).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _run(self, *command: str, **env: str) -> None:
        # Not captured: daemons keep what they inherit open.
        with (self.root / "log" / "start.log").open("ab") as log:
            done = subprocess.run(command, env={**self.env, **env}, stdout=log, stderr=log, timeout=60)
        assert done.returncode == 0, (self.root / "log" / "start.log").read_text()

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        files = [f"--{name}={folder / file}" for name, file in (("key-file", "key"), ("pid-file", "pid"))]
        files += [f"--socket={folder}/sock", f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--force"]
        self._run("runuser", "-u", "munge", "--", "munged", *files)

    def _start_accounting(self) -> None:
        db, run = self.root / "db", self.root / "run" / "db"
        for folder in (db, run):
            folder.mkdir()
            shutil.chown(folder, "mysql", "mysql")
        common = ["--no-defaults", "--user=mysql", f"--datadir={db}"]
        self._run("mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db")
        socket_file = run / "my.sock"
        lean = ["--skip-networking", "--innodb-buffer-pool-size=32M", "--performance-schema=OFF"]
        with (self.root / "log" / "mariadb.log").open("wb") as log:
            files = [f"--socket={socket_file}", f"--pid-file={run}/my.pid"]
            subprocess.Popen(["mariadbd", *common, *lean, *files], env=self.env, stdout=log, stderr=log)
        client = ["mariadb", "--no-defaults", "-S", str(socket_file), "-u", "root"]
        wait_for("a database", lambda: self.ask(*client, "-N", "-e", "select 1") == "1")
        grant = "create user slurm@localhost identified by 'x'; grant all on slurm_acct_db.* to slurm@localhost"
        self._run(*client, "-e", f"create database slurm_acct_db; {grant}")
        conf = self.root / "slurmdbd.conf"
        conf.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self.root}/munge/sock\nDbdHost=localhost\nDbdPort={self.ports[4]}\n"
            f"SlurmUser=root\nLogFile={self.root}/log/slurmdbd.log\nPidFile={self.root}/run/slurmdbd.pid\n"
            "StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser=slurm\nStoragePass=x\n"
            "StorageLoc=slurm_acct_db\n"
        )
        conf.chmod(0o600)
        self.conf.write_text(self._config())
        self._run("slurmdbd", MYSQL_UNIX_PORT=str(socket_file))
        log_file = self.root / "log" / "slurmdbd.log"
        wait_for("slurmdbd", lambda: log_file.exists() and "started" in log_file.read_text())
        for what in (["cluster", "test"], ["account", "lab"], ["user", "root", "account=lab", "defaultaccount=lab"]):
            self._run("sacctmgr", "-i", "add", *what)

    def limit(self, jobs: int) -> None:
        """So many jobs at most may be queued or running; -1: any number. Needs accounting."""
        self._run("sacctmgr", "-i", "modify", "user", "root", "set", f"MaxSubmitJobs={jobs}")
        shown = ["scontrol", "show", "assoc_mgr", "users=root", "accounts=lab", "flags=assoc"]
        limits = [str(jobs)] if jobs >= 0 else []
        wait_for("the limit to hold", lambda: re.findall(r"MaxSubmitJobs=(\d+)", self.ask(*shown)) == limits)

    def _config(self) -> str:
        root, ports = self.root, self.ports
        settings: dict[str, object] = {
            "ClusterName": "test",
            "SlurmctldHost": "localhost",
            "SlurmctldPort": ports[0],
            "SlurmdPort": ports[1],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # cred_expire also says how long a requeued job waits before it may start again: 120 s unless it is set, and
            # also where it is set to less than 5.
            "AuthInfo": f"socket={root}/munge/sock,cred_expire=5",
            "StateSaveLocation": f"{root}/state",
            "SlurmdSpoolDir": f"{root}/spool/%n",
            "SlurmctldPidFile": f"{root}/run/slurmctld.pid",
            "SlurmdPidFile": f"{root}/run/slurmd-%n.pid",
            "SlurmctldLogFile": f"{root}/log/slurmctld.log",
            "SlurmdLogFile": f"{root}/log/slurmd-%n.log",
            # neither systemd nor control groups
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerParameters": "bf_interval=1,sched_interval=2",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            _signal_on_preemption()[0]: _signal_on_preemption()[1],
            "JobRequeue": 1,
            "MpiDefault": "none",
            "ReturnToService": 2,
            "KillWait": 10,
            "SlurmdTimeout": 10,
            "MinJobAge": 2,
            "MaxArraySize": 3,
            "GresTypes": "gpu",
            "AccountingStorageType": "accounting_storage/none",
        }
        if self.accounting:
            settings["AccountingStorageType"] = "accounting_storage/slurmdbd"
            settings |= {"AccountingStorageHost": "localhost", "AccountingStoragePort": ports[4]}
            settings |= {"AccountingStoragePass": f"{root}/munge/sock", "AccountingStorageTRES": "gres/gpu"}
            settings["AccountingStorageEnforce"] = "limits,qos"
        host = socket.gethostname().partition(".")[0]
        lines = [f"{key}={value}" for key, value in settings.items()]
        for node, port in zip(NODES, ports[2:4], strict=True):
            hardware = "CPUs=2 RealMemory=2000 Gres=gpu:a100:2 State=UNKNOWN"
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {hardware}")
        low = "Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20"
        lines.append(f"PartitionName=low Nodes=n[1-2] MaxTime=INFINITE State=UP {low}")
        lines.append("PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF")
        return "\n".join(lines) + "\n"


def _signal_on_preemption() -> tuple[str, str]:
    """Send a preempted job the signal it asked for, in the words of this version of Slurm."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    command = [shutil.which("slurmctld", path=path) or "slurmctld", "-V"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    if tuple(map(int, version.split(".")[:2])) < (23, 2):
        return "SlurmctldParameters", "preempt_send_user_signal"
    return "PreemptParameters", "send_user_signal"


def _free_ports(count: int) -> list[int]:
    taken = [socket.socket() for _ in range(count)]
    for each in taken:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
