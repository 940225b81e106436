"""What the terminal shows of a sweep on a cluster: what would be submitted, what was, and how far it is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_sweep.reports.layout import bar, duration, plural

if TYPE_CHECKING:
    from sae_sweep.cli.doctor import Finding
    from sae_sweep.slurm.status import Status, TaskStatus
    from sae_sweep.slurm.submit import Prepared
    from sae_sweep.slurm.tasks import Task
    from sae_sweep.sweep.heartbeat import Note
    from sae_sweep.sweep.plan import Pack

# Rows of a table, and problems, that are shown one by one.
LISTED = 10
# Lines of a remote traceback that are shown; `logs` has the rest.
TRACE_LINES = 6
_STYLES = {"finished": "green", "running": "cyan", "pending": "", "failed": "red", "lost": "yellow"}


def tasks_table(prepared: Prepared) -> RenderableType:
    """What `submit` would send: the first tasks with their packs, and what it comes to."""
    tasks, launcher = prepared.tasks, prepared.launcher
    table = _table("task>", "points>", "packs", "estimate>", "memory>")
    for number, task in enumerate(tasks[:LISTED]):
        memory = f"{task.bytes / 2**30:.1f} GiB"
        table.add_row(str(number), f"{len(task.points):,}", _packs(task.packs), duration(task.seconds), memory)
    lines: list[RenderableType] = [table]
    if len(tasks) > LISTED:
        lines.append(Text(f"… and {len(tasks) - LISTED:,} more", style="dim"))
    jobs = -(-len(tasks) // launcher.per_job)
    side = f", {plural(jobs, 'job')} of {launcher.per_job} GPUs" if launcher.per_job > 1 else ""
    points = plural(sum(len(task.points) for task in tasks), "point")
    done = f", {len(prepared.plan.finished):,} are finished" if prepared.plan.finished else ""
    head = Text.assemble((prepared.sweep.name, "bold"), f": {points} to do in {plural(len(tasks), 'task')}{side}{done}")
    return Group(*lines, Text(), head, Text(work(tasks, launcher.parallelism)))


def work(tasks: Sequence[Task], parallelism: int) -> str:
    """How long tasks take, in a sentence."""
    seconds = [task.seconds for task in tasks]
    at_once = min(len(tasks), parallelism)
    if at_once <= 1:
        return f"about {duration(sum(seconds))} of work"
    span = max(max(seconds), sum(seconds) / at_once)
    return f"about {duration(sum(seconds))} of work, {duration(span)} with {at_once:,} at a time"


def submitted(sweep: str, tasks: Sequence[Task], jobs: Sequence[str], parallelism: int) -> RenderableType:
    """What was sent, and what to do next."""
    points = plural(sum(len(task.points) for task in tasks), "point")
    grid = Table.grid(padding=(0, 2))
    what = "job" if len(jobs) == 1 else "jobs"
    grid.add_row(what, ", ".join(jobs))
    for name, command in (
        ("follow", f"status {sweep} --watch"),
        ("output", f"logs {sweep}"),
        ("stop", f"cancel {sweep}"),
    ):
        grid.add_row(name, Text(f"sae-sweep {command}", style="cyan"))
    head = Text.assemble((sweep, "bold"), f": {points} in {plural(len(tasks), 'task')}, {work(tasks, parallelism)}")
    return Group(head, grid)


def overview(now: Status, width: int, clock: bool = False) -> RenderableType:
    """How far a sweep is: counts, the jobs, what failed, what was lost."""
    parts: list[RenderableType] = [_headline(now, width, clock)]
    live = sorted(now.live, key=lambda task: _ORDER[str(task.state.phase)])
    if live:
        table = _table("job", "task>", "state", "node", "points>", "", "starts>")
        for task in live[: 2 * LISTED]:
            done = task.points - task.left
            starts = str(task.note["starts"]) if "starts" in task.note else ""
            progress = _bar(done, task.points, 10)
            state = Text(task.state.word.lower(), style=_STYLES.get(str(task.state.phase), "yellow"))
            row = (task.job, str(task.number), state, task.state.node, f"{done}/{task.points}", progress, starts)
            table.add_row(*row)
        parts += [Text(), table]
        if len(live) > 2 * LISTED:
            parts.append(Text(f"… and {len(live) - 2 * LISTED:,} more tasks", style="dim"))
    parts += [Text(line, style="cyan") for line in map(_at_work, now.runs)]
    problems = [*failures(now.failures), *losses(now.lost_tasks)]
    if problems:
        parts += [Text(), *problems]
    parts += [Text(line, style="dim") for line in _advice(now)]
    return Group(*parts)


def _at_work(run: Note) -> str:
    """What a run outside of Slurm is at."""
    return f"at work: {run.doing}" + (f", step {run.step:,} of {run.steps:,}" if run.steps else "")


def sentence(now: Status) -> str:
    """How far a sweep is, in one line."""
    parts = [f"{now.finished:,} of {now.points:,} finished", *_counts(now)]
    return ", ".join(parts + _time_left(now))


def failures(found: Mapping[str, Mapping[str, Any]]) -> list[Text]:
    """What failed: points of one reason together, with the end of the traceback."""
    together: dict[tuple[str, str], list[str]] = {}
    for id, info in found.items():
        reason = str(info.get("reason") or "no reason was noted")
        at = f" at step {info['step']}" if info.get("step") is not None and " step " not in reason else ""
        key = (reason + at, _tail(info.get("traceback")))
        together.setdefault(key, []).append(id)
    lines = []
    for (reason, trace), ids in list(together.items())[:LISTED]:
        text = Text.assemble((f"FAILED {plural(len(ids), 'point')}", "red"), f" {_some(ids)}: {reason}")
        text.append(trace, style="dim")
        lines.append(text)
    return lines + _more(len(together))


def losses(tasks: Sequence[TaskStatus]) -> list[Text]:
    """What was lost with its job, and what the task said of it."""
    lines = []
    for task in tasks[:LISTED]:
        head = (f"LOST {plural(task.left, 'point')}", "yellow")
        word = task.state.word.lower().replace("_", " ")
        text = Text.assemble(head, f" with job {task.job}: {word}{_at(task)}")
        text.append(_tail(task.note.get("reason")), style="dim")
        lines.append(text)
    return lines + _more(len(tasks))


def all_sweeps(found: Sequence[Status]) -> Table:
    """A line per sweep."""
    keys = ("finished", "running", "pending", "failed", "lost")
    table = _table("sweep", "points>", *(f"{key}>" for key in keys))
    for each in found:
        counts = {"finished": each.finished} | {key: each.count(key) for key in keys[1:]}
        cells = [Text(f"{counts[key]:,}", style=_STYLES[key] if counts[key] else "dim") for key in keys]
        table.add_row(each.sweep, f"{each.points:,}", *cells)
    return table


def log_heading(task: TaskStatus, folder: Path) -> Text:
    """Above the output of a task."""
    start = f", start {task.note['starts']}" if "starts" in task.note else ""
    # Without accounting Slurm only knows that it is gone.
    state = task.note.get("state", "gone") if task.state.word == "GONE" else task.state.word.lower()
    about = f"job {task.job}, task {task.number}: {plural(task.points, 'point')}, {state}{start}"
    return Text.assemble((f"== {about}", "bold"), (f"\n   {folder}", "dim"))


def checkup(findings: Sequence[Finding]) -> Table:
    """What the doctor found."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for each in findings:
        mark, style = ("✓", "green") if each.usable else ("–", "dim") if each.absent else ("✗", "yellow")
        text = Text(each.found)
        if each.advice:
            text.append(f"\n→ {each.advice}", style="" if each.usable else style)
        table.add_row(Text(mark, style), each.name, text)
    return table


_ORDER = {"running": 0, "unknown": 1, "pending": 2, "ended": 3}


def _headline(now: Status, width: int, clock: bool) -> Text | Group:
    head = Text.assemble((now.sweep, "bold"))
    head.append(f"  {now.finished:,} of {now.points:,} finished", style="green" if now.finished == now.points else "")
    for key in ("running", "pending", "failed", "lost"):
        if now.count(key):
            head.append(", ")
            head.append(f"{now.count(key):,} {key}", style=_STYLES[key])
    for part in _time_left(now):
        head.append(f", {part}")
    if clock:
        head.append(time.strftime("  (%H:%M:%S)"), style="dim")
    return Group(head, _bar(now.finished, now.points, min(width, 80)))


def _bar(done: int, total: int, width: int) -> Text:
    filled = bar(done, total, width).rstrip()
    return Text.assemble((filled, "green"), ("░" * (width - len(filled)), "dim"))


def _counts(now: Status) -> list[str]:
    return [f"{now.count(key):,} {key}" for key in ("running", "pending", "failed", "lost") if now.count(key)]


def _time_left(now: Status) -> list[str]:
    parts = [f"about {duration(now.seconds)} left"] if now.live or now.runs else []
    return [*parts, "Slurm does not answer"] if now.unknown else parts


def _advice(now: Status) -> list[str]:
    again = "submit again to send what is missing or failed; finished points are kept"
    lines = []
    if now.unsent and now.tasks:
        lines.append(f"{plural(now.unsent, 'pending point')} in no job: submit again once Slurm takes more")
    if now.failures or now.lost_tasks:
        lines += [f"sae-sweep logs {now.sweep} shows what the tasks wrote; {again}"]
    return lines


def _packs(packs: Sequence[Pack]) -> str:
    """How many, and of what: SAEs by architecture and width."""
    kinds: Counter[str] = Counter()
    for pack in packs:
        kinds[f"{pack[0].sae.architecture} {pack[0].sae.width}"] += len(pack)
    return f"{len(packs)}: " + ", ".join(f"{count}× {kind}" for kind, count in kinds.items())


def _some(ids: Sequence[str]) -> str:
    return ", ".join(id[:8] for id in ids[:3]) + (", …" if len(ids) > 3 else "")


def _at(task: TaskStatus) -> str:
    node = task.state.node or task.note.get("node")
    return f" on {node}" if node else ""


def _tail(text: Any) -> str:
    lines = str(text or "").rstrip().splitlines()[-TRACE_LINES:]
    return "".join(f"\n    {line}" for line in lines)


def _more(count: int) -> list[Text]:
    return [Text(f"… and {count - LISTED:,} more", style="dim")] if count > LISTED else []


def _table(*columns: str) -> Table:
    """Without lines; a column whose name ends in `>` is to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table
