"""A run as it happens: on the screen, and to W&B if its logger asks for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from sae_sweep.config.grid import Sweep
from sae_sweep.reports.live import LiveView
from sae_sweep.store.store import Store
from sae_sweep.sweep.events import Event, Logging, Note, PointDone
from sae_sweep.sweep.heartbeat import Beat
from sae_sweep.sweep.plan import Work
from sae_sweep.tracking.wandb import WandbLog


@dataclass(frozen=True)
class Watch:
    """Takes the events of a run; `log` is None where nothing is logged to W&B."""

    view: LiveView
    log: WandbLog | None
    beat: Beat

    def handle(self, event: Event) -> None:
        """Show an event, note it for other shells, and log the point that it finishes."""
        self.view.handle(event)
        self.beat.handle(event)
        if self.log is not None and isinstance(event, PointDone):
            self.log.log_point(event.record)


@contextmanager
def watch(sweep: Sweep, work: Work, store: Store) -> Iterator[Watch]:
    """Watch the work being done; leaving waits until all is logged."""
    with ExitStack() as stack:
        finished = len(work.plan.finished) - len(work.stale)
        view = stack.enter_context(LiveView(len(work.plan.points), finished, work.plan.seconds))
        log = None
        if sweep.logger["name"] != "none":
            log = stack.enter_context(open_log(store, sweep.name, sweep.logger, view.handle))
        beat = stack.enter_context(Beat(store, sweep.name, work.plan.packs, view.seconds_left))
        yield Watch(view, log, beat)


def open_log(store: Store, sweep: str, logger: Mapping[str, Any], say: Callable[[Event], None]) -> WandbLog:
    """The W&B log of a sweep; `say` takes its notes, and how far it is once all is trained."""
    # The sweep may be older than a key.
    settings = {key: logger[key] for key in ("project", "entity", "mode", "artifacts") if key in logger}
    return WandbLog(
        store.sweep(sweep),
        sweep,
        **settings,
        note=lambda text: say(Note(text)),
        waiting=lambda done, total: say(Logging(done, total)),
    )
