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

from sae_sweep.config.settings import Encoder, Point, counts, init_name
from sae_sweep.reports import layout
from sae_sweep.reports.layout import fraction, write
from sae_sweep.sweep.events import Event, Logging, Note, PointDone, PointFailed, ToyAccuracy, ToyProgress, TrainProgress

_LAST = 4
# Failures that stay on the screen; further ones are counted.
_FAILURES = 5
# From this width on a finished point shows its id and place, and bars say what they are of.
_WIDE = 110
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
        self._logging: Logging | None = None
        self._accuracies: set[str] = set()
        self._last: deque[tuple[str, str, str]] = deque(maxlen=_LAST)
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
                self._say(f"toy {_toy(event)} trained, loss {event.loss:.4f}")
        elif isinstance(event, TrainProgress):
            if self._training is None or event.pack != self._training.pack:
                self._training_points = event.points
            self._toy, self._training = None, event
        elif isinstance(event, ToyAccuracy):
            # Every pack says it.
            if event.text not in self._accuracies:
                self._accuracies.add(event.text)
                self._say(event.text, style="yellow" if event.is_low else "")
        elif isinstance(event, Note):
            self._say(event.text, style="yellow")
        elif isinstance(event, Logging):
            if self._live is None and self._logging is None:
                self._say(f"logging to W&B: {event.total - event.done} of {event.total} runs left")
            self._toy, self._training, self._logging = None, None, event
        else:
            self._finish_point(event)

    def _finish_point(self, event: PointDone | PointFailed) -> None:
        self._training_points = max(0, self._training_points - 1)
        what = describe(event.point)
        name = f"{event.point.id[:8]} {what}"
        if isinstance(event, PointFailed):
            self._failed += 1
            if self._live is not None and self._failed > _FAILURES:
                if self._failed == _FAILURES + 1:
                    self._say("more points failed: the report has them all", style="red")
                return
            at = "" if event.step is None else f" at step {event.step}"
            self._say(f"{self._counter()} FAILED {name}{at}: {event.reason}", style="red")
            return
        self._done += 1
        if self._live is None:
            self._say(f"{self._counter()} done {name} {_metrics(event)}".rstrip())
        else:
            self._last.append((f"{self._counter()} {event.point.id[:8]}  ", what, _columns(event)))

    def _counter(self) -> str:
        return f"[{self._finished + self._done + self._failed}/{self._total}]"

    def _say(self, line: str, style: str = "") -> None:
        """Show a line for good; on a terminal above the view."""
        if self._silent:
            return
        if self._live is None:
            write(self._console, Text(line, style=style, no_wrap=True, overflow="ignore"))
        else:
            self._console.print(Text(line, style=style))
            self._live.refresh()

    # -- the view on a terminal -----------------------------------------------------------------------------------

    def _render(self) -> RenderableType:
        try:
            return self._view()
        except Exception:  # the run changes what is drawn while it is drawn
            return Text("")

    def _view(self) -> RenderableType:
        wide = self._console.width >= _WIDE
        last = Table.grid(expand=True, padding=(0, 2))
        last.add_column(ratio=1, no_wrap=True, overflow="ellipsis", style="dim")
        last.add_column(no_wrap=True, style="dim")
        for place, what, metrics in self._last:
            last.add_row(f"  {place if wide else ''}{what}", metrics)
        bars = Table.grid(padding=(0, 1))
        bars.add_column(min_width=11, no_wrap=True)
        bars.add_column(width=max(10, min(80, self._console.width - (72 if wide else 60))))
        bars.add_column(no_wrap=True)
        if self._toy is not None or self._training is not None:
            bars.add_row(*self._at_work(wide))
        reported = self._finished + self._done + self._failed
        parts = [f"{reported:,}/{self._total:,}"]
        parts += [f"[red]{self._failed:,} failed[/red]"] if self._failed else []
        left = f"  {self._left()}" if self._logging is None else ""
        bars.add_row("points", _progress(reported, self._total, "green"), ", ".join(parts) + left)
        if self._logging is not None:
            logged, runs = self._logging.done, self._logging.total
            bars.add_row("W&B", _progress(logged, runs, "cyan"), f"{logged:,}/{runs:,} runs logged")
        return Group(last, bars) if self._last else bars

    def _at_work(self, wide: bool) -> tuple[str, ProgressBar, str]:
        """What is in training: a toy, or a pack."""
        if self._toy is not None:
            toy = self._toy
            named = f"  {_toy(toy)}" if wide else ""
            detail = f"{toy.step:,}/{toy.steps:,} steps  loss {toy.loss:.4f}{named}"
            if toy.step >= toy.steps:
                detail = "trained; preparing the SAEs"
            return "toy", _progress(toy.step, toy.steps, "cyan"), detail
        training = self._training
        assert training is not None
        detail = f"{training.step:,}/{training.steps:,} steps  FVU {fraction(training.fvu)}  L0 {training.l0:.2f}"
        if wide:
            detail += f"  {training.points} SAEs"
        label = f"pack {training.pack} of {training.packs}"
        return label, _progress(training.step, training.steps, "cyan"), detail

    def _left(self) -> str:
        return f"{clock(self.seconds_left())} left"

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
    """A point in a few words: width, init, encoder if not linear, penalty and coefficient, and the seed."""
    sae, penalty = point.sae, point.penalty
    init = init_name(sae.init, sae.get("partition"))
    encoder = "" if point.encoder == Encoder() else f" {point.encoder.name}"
    if counts(sae.architecture):
        sparsity = f"{sae.architecture} k={sae.k}"
    else:
        further = penalty.words.removeprefix(penalty.title)
        sparsity = f"{penalty.title} c={penalty.coefficient:g}{further}"
    return f"width={sae.width} {init}{encoder} {sparsity} seed={point.seed}"


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


def _columns(event: PointDone) -> str:
    """The metrics of a finished point, each in a place of its own."""
    metrics = event.record.get("metrics", {})
    shown = (
        ("FVU", "fvu", fraction, 5),
        ("L0", "l0", "{:.2f}".format, 6),
        ("splits", "splits_per_max", "{:.2f}".format, 5),
    )
    texts = []
    for name, key, show, width in shown:
        value = metrics.get(key)
        texts.append(f"{name} {'–' if value is None else show(value):>{width}}")
    return "  ".join(texts)


def _toy(event: ToyProgress) -> str:
    return f"{event.toy.title} seed {event.toy.seed}"


def _progress(done: int, total: int, colour: str) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=done, complete_style=colour, finished_style=colour)


def _can_redraw(console: Console) -> bool:
    # Not console.is_terminal alone: FORCE_COLOR makes that true of a pipe.
    return console.file.isatty() and not console.is_dumb_terminal and console.encoding.startswith("utf")
