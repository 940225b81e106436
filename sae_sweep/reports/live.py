"""What a run shows while it works: a calm view on a terminal, one line per finished point elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sae_sweep.reports import layout
from sae_sweep.reports.layout import fraction, write
from sae_sweep.schema import COUNTED, PENALTY_KEYS, Point
from sae_sweep.sweep.events import Event, Note, PointDone, PointFailed, ToyProgress, TrainProgress

_LAST = 4
# Of the plan's estimate and the pace so far, the pace decides once this share of the work is done.
_PACE_TRUSTED = 0.2


class LiveView:
    """Shows the events of a run. It never raises: a view that cannot be drawn falls silent.

    Args:
        total: points of the whole grid.
        finished: those of them that were finished before.
        estimate_seconds: the plan's estimate for the rest.
        stream: where to write (stderr).
    """

    def __init__(self, total: int, finished: int, estimate_seconds: float, stream: TextIO | None = None) -> None:
        self._total, self._finished, self._estimate = total, finished, estimate_seconds
        self._done = self._failed = 0
        # Points of the pack in training that have not been reported yet.
        self._training_points = 0
        self._toy: ToyProgress | None = None
        self._training: TrainProgress | None = None
        self._last: deque[str] = deque(maxlen=_LAST)
        self._started = time.monotonic()
        self._silent = False
        self._live: Live | None = None
        self._console = layout.stream_console(stream or sys.stderr)

    def __enter__(self) -> LiveView:
        self._started = time.monotonic()
        if _can_redraw(self._console):
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
            )
            try:
                self._live.start()
            except Exception:
                self._live, self._silent = None, True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            try:
                self._live.stop()
            except Exception:
                self._silent = True

    def handle(self, event: Event) -> None:
        """Take note of an event and show it."""
        try:
            self._take(event)
        except Exception:  # a closed pipe, a terminal gone: the run matters more than the view
            self._silent = True

    def _take(self, event: Event) -> None:
        if isinstance(event, ToyProgress):
            self._toy = event
            if event.step >= event.steps:
                self._say(f"toy {_toy(event)} trained, loss {event.loss:.4f}", keep=False)
        elif isinstance(event, TrainProgress):
            if self._training is None or event.pack != self._training.pack:
                self._training_points = event.points
            self._toy, self._training = None, event
        elif isinstance(event, Note):
            self._say(event.text, style="yellow", keep=True)
        else:
            self._finish_point(event)

    def _finish_point(self, event: PointDone | PointFailed) -> None:
        self._training_points = max(0, self._training_points - 1)
        name = f"{event.point.id[:8]} {describe(event.point)}"
        if isinstance(event, PointFailed):
            self._failed += 1
            at = "" if event.step is None else f" at step {event.step}"
            self._say(f"{self._counter()} FAILED {name}{at}: {event.reason}", style="red", keep=True)
            return
        self._done += 1
        self._say(f"{self._counter()} done {name} {_metrics(event)}".rstrip(), keep=False)

    def _counter(self) -> str:
        return f"[{self._finished + self._done + self._failed}/{self._total}]"

    def _say(self, line: str, keep: bool, style: str = "") -> None:
        """Show a line: for good where lines are all there is or it matters (`keep`), else among the last few."""
        if self._silent:
            return
        if self._live is None:
            write(self._console, Text(line, style=style, no_wrap=True, overflow="ignore"))
        elif keep:
            self._console.print(Text(line, style=style))
            self._live.refresh()
        else:
            self._last.append(line)

    # -- the view on a terminal -----------------------------------------------------------------------------------

    def _render(self) -> RenderableType:
        try:
            return self._view()
        except Exception:  # the run changes what is drawn while it is drawn
            return Text("")

    def _view(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(min_width=10, no_wrap=True)
        grid.add_column(width=max(10, min(40, self._console.width - 50)))
        grid.add_column(no_wrap=True)
        toy, training = self._toy, self._training
        if toy is not None:
            detail = f"{toy.step}/{toy.steps} steps  loss {toy.loss:.4f}"
            grid.add_row(f"toy {_toy(toy)}", _progress(toy.step, toy.steps, "cyan"), detail)
        elif training is not None:
            detail = f"{training.step}/{training.steps} steps  FVU {fraction(training.fvu)}  L0 {training.l0:.2f}"
            grid.add_row(
                f"pack {training.pack} of {training.packs}",
                _progress(training.step, training.steps, "cyan"),
                detail,
            )
        reported = self._finished + self._done + self._failed
        failed = f", {self._failed} failed" if self._failed else ""
        left = f"  {clock(self.seconds_left())} left"
        grid.add_row("points", _progress(reported, self._total, "green"), f"{reported}/{self._total}{failed}{left}")
        last = [Text(f"  {line}", style="dim", no_wrap=True, overflow="ellipsis") for line in self._last]
        return Group(*last, grid)

    def seconds_left(self) -> float:
        """The plan's estimate, given up for the pace so far as far as there is one."""
        progress = self._progress()
        elapsed = time.monotonic() - self._started
        trust = min(1.0, progress / _PACE_TRUSTED)
        whole_by_pace = elapsed / progress if progress > 0 else 0.0
        return (1 - progress) * ((1 - trust) * self._estimate + trust * whole_by_pace)

    def _progress(self) -> float:
        """The share of this run's points that are done, those in training counted by their steps."""
        to_do = self._total - self._finished
        training = self._training
        partial = self._training_points * training.step / training.steps if training is not None else 0.0
        return min(1.0, (self._done + self._failed + partial) / to_do) if to_do > 0 else 1.0


def describe(point: Point) -> str:
    """A point in a few words: width, start, penalty and coefficient, and the seed."""
    sae, penalty = point.sae, point.penalty
    start = f"{sae.init}-{sae.partition}" if sae.init == "oracle" else sae.init
    if sae.architecture in COUNTED:
        sparsity = f"{sae.architecture} k={sae.k}"
    else:
        further = "".join(f" {key}={getattr(penalty, key):g}" for key in PENALTY_KEYS[penalty.name])
        sparsity = f"{penalty.name} c={penalty.coefficient:g}{further}"
    return f"width={sae.width} {start} {sparsity} seed={point.seed}"


def clock(seconds: float) -> str:
    """Seconds as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _metrics(event: PointDone) -> str:
    metrics = event.record.get("metrics", {})
    shown = {"fvu": ("fvu", fraction), "l0": ("l0", "{:.2f}".format), "splits_per_max": ("splits/max", "{:.2f}".format)}
    given = [(name, show(metrics[key])) for key, (name, show) in shown.items() if metrics.get(key) is not None]
    return " ".join(f"{name}={text}" for name, text in given)


def _toy(event: ToyProgress) -> str:
    return f"{event.toy.title} seed {event.toy.seed}"


def _progress(done: int, total: int, colour: str) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=done, complete_style=colour, finished_style=colour)


def _can_redraw(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
