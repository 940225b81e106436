"""How W&B's own client is used here: lean, its side files inside the sweep, and one call that writes a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# No samples of the machine, no code, no console capture: a run is a few kilobytes and some 20 ms. The transaction log
# reaches the disk every second, so that a run killed half-way is not lost whole.
LEAN = {
    "silent": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "label_disable": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 1.0,
    "symlink": False,
    "use_dot_wandb": False,
    "sagemaker_disable": True,
    "finish_timeout_raises": True,
}
# Seconds. A server that takes longer to start a run, or to take the rest of it at its end, means offline from there on.
TIMEOUT = 10.0


@dataclass(frozen=True)
class Run:
    """A run to be logged, as plain data. `history`: (step, values)."""

    id: str
    # Of the content: the same run with another fingerprint is logged anew in its place.
    fingerprint: str
    name: str
    job_type: str
    config: dict[str, Any]
    history: Sequence[tuple[int, dict[str, Any]]]
    summary: dict[str, Any]
    # Key → what `_drawn` makes of it.
    media: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Its files become an artifact.
    folder: str | None = None

    @property
    def mark(self) -> str:
        """Its entry in the ledger of what was logged."""
        return f"{self.id}.{self.fingerprint}"


@contextmanager
def own_environment(folder: Path) -> Iterator[None]:
    """W&B's side files inside the sweep, no telemetry of its own; the process's environment as before afterwards."""
    changed = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "DATA", "ARTIFACT")}
    changed["WANDB_ERROR_REPORTING"] = "false"
    # W&B leaves variables of its own behind, such as the address of a service that has ended.
    before = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
    os.environ.update(changed)
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith("WANDB_")]:
            del os.environ[key]
        os.environ.update(before)


def set_up(mode: str, timeout: float = TIMEOUT) -> Any:
    """Import W&B and start its service. W&B then hooks sys.exit and sys.excepthook, which are not its own: undone.

    timeout: seconds that a server has to start a run, and again to take the rest of it at its end.
    """
    import wandb

    hooks = sys.exit, sys.excepthook
    settings = {**LEAN, "init_timeout": timeout, "finish_timeout": timeout}
    wandb.setup(settings=wandb.Settings(**settings, **({} if mode == "auto" else {"mode": mode})))
    sys.exit, sys.excepthook = hooks
    return wandb


def write(wandb: Any, run: Run, **where: Any) -> None:
    """Write one run, whole. `where`: the folder, mode, project, entity and group, as `wandb.init` takes them."""
    with wandb.init(
        id=run.id, name=run.name, job_type=run.job_type, config=run.config, reinit="create_new", **where
    ) as live:
        last = 0
        for last, values in run.history:
            live.log(values, step=last)
        if run.media:
            live.log({key: _drawn(wandb, media) for key, media in run.media.items()}, step=last)
        if run.folder:
            live.log_artifact(_artifact(wandb, run))
        live.summary.update(run.summary)
    # W&B reports a full disk nowhere but in its own log files.
    if not Path(live.settings.sync_file).stat().st_size:
        raise OSError(f"nothing was written to {live.settings.sync_file}")


def _drawn(wandb: Any, media: Mapping[str, Any]) -> Any:
    """A table, a chart of lines or of bars, or a figure, as W&B's own object."""
    if "columns" in media:
        return wandb.Table(columns=media["columns"], data=media["rows"])
    if "lines" in media:
        xs, ys = ([[point[axis] for point in line] for line in media["lines"].values()] for axis in (0, 1))
        return wandb.plot.line_series(xs, ys, [*media["lines"]], title=media["title"], xname=media["x_name"])
    if "bars" in media:
        bars = wandb.Table(columns=["label", "value"], data=[[*bar] for bar in media["bars"].items()])
        return wandb.plot.bar(bars, "label", "value", title=media["title"])
    from plotly.graph_objects import Figure

    return wandb.Plotly(Figure(media["figure"], skip_invalid=True))


def _artifact(wandb: Any, run: Run) -> Any:
    """A point's files. Never copied: what the store holds is never written to again."""
    # The numbers are the run's: W&B takes a hundred keys here.
    artifact = wandb.Artifact(f"sae-{run.id}", type="sae", description=run.name)
    assert run.folder is not None
    for path in sorted(Path(run.folder).iterdir()):
        if path.is_file():
            artifact.add_file(str(path), policy="immutable")
    return artifact
