"""Signals that ask the process to stop become one exception, whatever it is doing."""

from __future__ import annotations

import signal
from types import FrameType

# Ctrl-C; what schedulers send to end a job; what Slurm sends, if asked, some time before it does.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupted(BaseException):
    """A signal asked the process to stop; finished points are in the store and a rerun does the rest."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 130 if number == signal.SIGINT else 75


def raise_on_signals() -> None:
    """From now on the main thread raises Interrupted where it stands."""
    for number in SIGNALS:
        signal.signal(number, _stop)


def note_signals() -> None:
    """From now on signals are only noted, for `check` to raise where it is called: between steps, not within one."""
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: _received.append(Interrupted(number)))


def received() -> Interrupted | None:
    """What a signal has asked for. It may not have got through: C libraries drop or replace what is raised in them."""
    return _received[0] if _received else None


def check() -> None:
    """Raise what a signal has asked for, if that did not get through."""
    if _received:
        raise _received[0]


def ignore_signals() -> None:
    """From now on they change nothing: the process is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_received: list[Interrupted] = []


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(Interrupted(number))
    raise _received[0]
