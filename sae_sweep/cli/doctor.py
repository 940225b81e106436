"""What works here, and what to do about the rest: one check for each thing that a sweep may need."""

from __future__ import annotations

import locale
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sae_sweep import environment
from sae_sweep.errors import UserError
from sae_sweep.slurm import queue

# Below this many bytes a sweep of some thousand points may not fit.
SPACE = 10 * 2**30
# Partitions that are listed.
MOST = 8
# Filesystems that only the machine itself sees.
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "apfs")


@dataclass(frozen=True)
class Finding:
    """One thing: whether it can be used, what was found, and what to do where it cannot.

    absent: it is not there, and nothing is wrong with that.
    """

    name: str
    usable: bool
    found: str
    advice: str = ""
    absent: bool = False


def examine(output_dir: Path) -> list[Finding]:
    """All checks, in the order in which a user would need them. None of them raises."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("GPU", gpu),
        ("current folder", current_folder),
        ("home", home),
        ("user", user),
        ("text", text),
        ("compiled code", compiled_code),
        ("output folder", lambda: folder(output_dir)),
        ("shared filesystem", lambda: filesystem(output_dir)),
        ("Slurm", slurm),
        ("sacct", accounting),
        ("W&B", wandb),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except Exception as problem:  # what is broken is to be said, whatever it is
            findings.append(Finding(name, False, " ".join(str(problem).split())[:200] or type(problem).__name__))
    return findings


def gpu() -> Finding:
    """Whether PyTorch can train on a GPU of this machine."""
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("GPU", True, names)
    advice = "sweeps train on the processor here; a GPU needs NVIDIA's driver and a PyTorch built for CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        advice = "CUDA_VISIBLE_DEVICES is empty and hides every GPU: unset it"
    return Finding("GPU", False, f"PyTorch {torch.__version__} sees none", advice, absent=True)


def current_folder() -> Finding:
    """Whether the folder that the process stands in is there."""
    environment.check_current_folder()
    return Finding("current folder", True, str(Path.cwd()))


def home() -> Finding:
    """Whether there is a home to write settings and caches to."""
    place = environment.home()
    if place is None or not place.is_dir():
        return Finding("home", False, f"{place or 'none'} is not there", "set HOME to a folder that can be written")
    writable = os.access(place, os.W_OK)
    return Finding(
        "home", writable, str(place), "" if writable else "it cannot be written: set HOME to one that can be"
    )


def user() -> Finding:
    """Whether the user has a name."""
    name = environment.user()
    advice = "" if name else "no entry in passwd: jobs are submitted under the number; LOGNAME=… gives a name"
    return Finding("user", bool(name), name or str(os.getuid()), advice, absent=not name)


def text() -> Finding:
    """Whether text is UTF-8; where it is not, `prepare` has started the process again."""
    return Finding("text", environment.utf8(), f"UTF-8, {locale.setlocale(locale.LC_CTYPE)}")


def compiled_code() -> Finding:
    """Where numba keeps what it compiles."""
    place = os.environ.get("NUMBA_CACHE_DIR") or environment.numba_cache()
    if place is None:
        advice = "each process compiles anew, some half a minute: set NUMBA_CACHE_DIR to a folder that can be written"
        return Finding("compiled code", False, "nowhere to keep it", advice)
    return Finding("compiled code", True, f"kept in {place}")


def folder(output_dir: Path) -> Finding:
    """Whether results can be written, and how many."""
    from sae_sweep.config.overrides import check_writable

    try:
        check_writable(output_dir)
    except UserError as error:
        return Finding("output folder", False, str(error), "choose another with output_dir=…")
    if any(number in str(output_dir.absolute()) for number in queue.NUMBERS):
        found = f"{output_dir.absolute()}: {', '.join(queue.NUMBERS)} stand for numbers of jobs on Slurm"
        return Finding("output folder", False, found, "fine without Slurm; else choose another with output_dir=…")
    free = shutil.disk_usage(_existing(output_dir)).free
    found = f"{output_dir.absolute()}, {free / 2**30:.0f} GiB free"
    return Finding("output folder", free >= SPACE, found, "" if free >= SPACE else "make room, or choose output_dir=…")


def filesystem(output_dir: Path) -> Finding:
    """Whether the output folder can be one for several machines: of a kind that is shared, with whole renames."""
    place = _existing(output_dir)
    kind = _kind(place)
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as name:
        first, second = Path(name, "first"), Path(name, "second")
        for each in (first, second):
            each.mkdir()
            (each / "file").write_bytes(b"")
        try:
            first.rename(second)
        except OSError:
            pass
        else:
            return Finding("shared filesystem", False, f"{kind} lets a folder replace another", "choose output_dir=…")
    advice = "fine for one machine; for a cluster choose an output_dir that every node sees, such as one on NFS"
    local = kind in LOCAL
    return Finding("shared filesystem", not local, f"{kind} at {place}", advice if local else "", absent=local)


def slurm() -> Finding:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        advice = "submit from a login node of a cluster; any other job array can run `sae-sweep run --shard I/N`"
        return Finding("Slurm", False, "sbatch or srun is not on the PATH", advice, absent=True)
    try:
        asked = subprocess.run(["sinfo", "-h", "-o", "%P %D nodes %G"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return Finding("Slurm", False, "sinfo does not answer", "is slurmctld up? `scontrol ping` says")
    if asked.returncode:
        problem = " ".join(asked.stderr.split())[:200]
        if "fetch_config" in problem:  # neither a slurm.conf nor a server that gives one
            advice = "its commands are installed, but no cluster is configured: set SLURM_CONF if there is one"
            return Finding("Slurm", False, "no slurm.conf", advice, absent=True)
        return Finding("Slurm", False, problem, "is slurmctld up, and SLURM_CONF right? `scontrol ping` says")
    lines = asked.stdout.strip().splitlines()
    more = [f"… {len(lines) - MOST} more"] if len(lines) > MOST else []
    return Finding("Slurm", True, "; ".join(lines[:MOST] + more))


def accounting() -> Finding:
    """Whether Slurm remembers how jobs ended."""
    if queue.accounting():
        return Finding("sacct", True, "answers")
    advice = "not needed: status then knows that a job ended, but after five minutes no longer how"
    return Finding("sacct", False, "does not answer", advice, absent=True)


def wandb() -> Finding:
    """Whether runs can be logged online."""
    from sae_sweep.tracking.process import set_up

    offline = "runs are logged offline into the sweep's folder: `sae-sweep sync SWEEP` pushes them from elsewhere"
    client = set_up("auto")
    try:
        if client.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return Finding("W&B", False, f"its mode is {client.setup().settings.mode}", offline, absent=True)
        if client.login(prompt=False):
            return Finding("W&B", True, f"a key, and {client.setup().settings.base_url} takes it")
    except Exception as problem:
        return Finding("W&B", False, " ".join(str(problem).split())[:200], offline)
    advice = f"`wandb login` stores one; until then {offline}"
    return Finding("W&B", False, "no API key is configured", advice, absent=True)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _kind(path: Path) -> str:
    """The kind of filesystem that a folder lies on, as the kernel calls it."""
    place, best, kind = path.resolve(), Path("/"), "unknown"
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        _, point, name, *_ = line.split()
        mounted = Path(point.replace("\\040", " "))
        if place.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, name
    return kind
