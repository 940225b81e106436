"""Whether this machine's GPU computes with our kernels what the reference computes: asked once, then remembered.

The first stack of a kind (architecture, penalties, length of an activation, and on which side of the widths at which
the kernels change) has a small stack of the same kind trained by both. What the kernels made is compared after each of
two calls of two steps, so that the captured graph is compared too; and with what they make of it a second time, and of
one SAE alone. This happens in a process of its own: a kernel that reads where it must not would take the CUDA context
of the run with it.

Answers are files in `$XDG_CACHE_HOME/sae-sweep/kernels` (by default `~/.cache/sae-sweep/kernels`), named by a hash of
the GPU, its driver, PyTorch, Triton, our kernels' sources and the kind of stack. Where nothing can be written there,
every process asks anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae_sweep.config.settings import Point, Training, point_from
from sae_sweep.errors import UserError
from sae_sweep.kernels.cuda.tiling import NARROW, WIDE
from sae_sweep.saes.annealing import anneal
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend

# Two calls of so many steps each: the first step is launched kernel by kernel, the others are replayed.
CALLS, STEPS = 2, 2
# Batch × width of the stack that is compared, at most: the reference holds twelve such tensors.
CODES = 1 << 22
# Relative differences that rounding may make: it decides whether a latent on the edge fires, and so moves a gradient.
GRADIENT, LOSS = 1e-2, 1e-4
# How long the process may take that compares, compilation included.
SECONDS = 300.0
# What it prints before its answer, and where it could not ask: another process may not use the GPU, say.
ANSWER, UNABLE = "answer: ", "unable"


@dataclass(frozen=True)
class Check:
    """A small stack of the kind that is about to be trained: its points, the length d of x, and its batch size."""

    points: tuple[Point, ...]
    d: int
    b: int
    device: str = "cuda"
    # Of each of its CALLS.
    steps: int = STEPS

    @classmethod
    def of(cls, stack: Stack) -> Check:
        """That of a stack: a point per penalty, of which there are two at least, and the least width of its kind."""
        sae = stack.points[0].sae
        least = 96 if stack.width <= NARROW else NARROW + 128 if stack.width < WIDE else WIDE
        # Triton compiles other code where lengths are no multiples of 16.
        width = max(least if stack.width % 16 == 0 else least + 8, sae.get("k", 1))
        batch = max(16, min(stack.points[0].training.batch_size, CODES // width))
        training = Training(steps=100, lr=1e-4, batch_size=batch)
        by_title = {point.penalty.title: point.penalty for point in stack.points}
        penalties = [by_title[title].replace(coefficient=0.05) for title in sorted(by_title)]
        points = (
            Point(sae=sae.replace(width=width), penalty=penalty, training=training)
            for penalty in penalties * (1 if len(penalties) > 1 else 2)
        )
        return cls(tuple(points), stack.d, batch, stack.flat.device.type)

    def to_json(self) -> str:
        """The check as another process reads it."""
        return json.dumps({**vars(self), "points": [point.to_dict() for point in self.points]})

    @classmethod
    def from_json(cls, text: str) -> Check:
        """What `to_json` wrote. UserError: a kind that is not registered there."""
        settings = json.loads(text)
        return cls(**{**settings, "points": tuple(map(point_from, settings["points"]))})

    @property
    def kind(self) -> str:
        """What tells the code of its kernels from that of others: no setting that is a number at run time."""
        sae, found = self.points[0].sae, {formula_of(point.penalty) for point in self.points}
        formulas = ", ".join(sorted(f"{formula.text} {formula.outer_text}" for formula in found))
        return f"{sae.architecture}, width {sae.width}, k {sae.get('k', 0)}, d {self.d}, batch {self.b}; {formulas}"

    def stack(self, members: slice = slice(None)) -> Stack:
        """These SAEs of the stack at step 0.

        In its last SAE half of the latents fire, in the others few: so steps are taken by entries and by products.
        """
        width, starts = self.points[0].sae.width, []
        for i in range(len(self.points)):
            generator = torch.Generator().manual_seed(i)
            W_enc, W_dec = torch.nn.functional.normalize(torch.randn(2, width, self.d, generator=generator), dim=-1)
            few = 1.0 if width <= NARROW else 2.2
            b_enc = torch.full((width,), 0.0 if i == len(self.points) - 1 else -few)
            b_dec = torch.randn(self.d, generator=generator) / 10
            starts.append(Parameters(W_enc, 1.5 * W_dec, b_enc, b_dec, torch.zeros(())))
        return Stack.start(self.points[members], starts[members], self.device)

    def batches(self) -> Tensor:
        """Inputs of all calls [CALLS, steps, b, d]."""
        generator = torch.Generator().manual_seed(99)
        return torch.randn(CALLS, self.steps, self.b, self.d, generator=generator).to(self.device)


def compare(check: Check, make: Callable[[], Backend]) -> str:
    """What is wrong with the backend that `make` makes, in a few words; "" where it trains as the reference does."""
    try:
        return _difference(check, make)
    except Exception as error:  # whatever a compiler, a driver or a kernel may raise
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _difference(check: Check, make: Callable[[], Backend]) -> str:
    stacks = [check.stack(), check.stack(), check.stack(), check.stack(slice(-1, None))]
    expected, once, again, alone = stacks
    backends = [AutogradBackend(), make(), make(), make()]
    for number, batches in enumerate(check.batches()):
        for stack in stacks:
            anneal(stack, batches[0])
        by_reference, by_kernels, *_ = (b.advance(s, batches) for b, s in zip(backends, stacks, strict=True))
        for name in ("loss", "error", "l0"):
            want, got = getattr(by_reference, name), getattr(by_kernels, name)
            apart = float(((got - want).abs() / want.abs().clamp_min(1e-6)).max())
            if not apart < LOSS:  # a NaN is no agreement
                return f"{name} apart from the reference's by {apart:.1e} of it, in call {number + 1}"
        for name, held in (("gradient", "first"), ("gradient squared", "second"), ("parameters", "flat")):
            want, got = getattr(expected, held), getattr(once, held)
            apart = float(((got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)).max())
            if not apart < GRADIENT:
                return f"{name} apart from the reference's by {apart:.1e} of it, in call {number + 1}"
        if not torch.equal(once.flat, again.flat):
            return f"two runs differ, in call {number + 1}"
        if not torch.equal(once.flat[-1], alone.flat[0]):
            return f"an SAE alone and in a stack differ, in call {number + 1}"
    return ""


def problem(stack: Stack) -> str | None:
    """What is wrong with our kernels for this stack on this machine, in a few words; None where nothing is."""
    from sae_sweep.kernels.cuda.backend import CudaBackend

    check = Check.of(stack)

    def ask() -> str:
        answer = in_own_process(check)
        return answer if answer is not None else compare(check, CudaBackend)

    return remembered(check, machine(), ask) or None


def in_own_process(check: Check, command: Sequence[str] = (), seconds: float = SECONDS) -> str | None:
    """What `compare` says in a process of its own; None where it cannot be asked there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command or [sys.executable, "-m", __name__],
            input=check.to_json().encode(), capture_output=True, env=environment, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the check did not end within {seconds:.0f} s"
    except OSError:
        return None
    answers = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith(ANSWER)]
    if not answers:
        last = (done.stderr.decode(errors="replace").strip() or "no message").splitlines()[-1]
        return f"the check broke off with exit code {done.returncode}: {last[:200]}"
    answer = answers[-1].removeprefix(ANSWER)
    return None if answer == UNABLE else answer


# Answers of this process, by the name of their file.
_answers: dict[str, str] = {}


def remembered(check: Check, machine: str, ask: Callable[[], str]) -> str:
    """The answer that `ask` gave to this check on this machine, now or before."""
    described = {"machine": machine, "kernels": sources(), "kind": check.kind}
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    if name not in _answers:
        kept = _read(name)
        _answers[name] = _write(name, described, ask()) if kept is None else kept
    return _answers[name]


def folder() -> Path | None:
    """Where answers are kept; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):
        return (Path(base) if base else Path.home() / ".cache") / "sae-sweep" / "kernels"
    return None


def _read(name: str) -> str | None:
    place = folder()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if place:
            return str(json.loads((place / f"{name}.json").read_text())["problem"])
    return None


def _write(name: str, described: dict[str, str], answer: str) -> str:
    place = folder()
    with contextlib.suppress(OSError):
        if place:
            place.mkdir(parents=True, exist_ok=True)
            aside = place / f"{name}.{os.getpid()}"
            aside.write_text(json.dumps({"problem": answer, **described}, indent=1))
            aside.replace(place / f"{name}.json")
    return answer


def machine() -> str:
    """The GPU, its driver, and the versions of what compiles for it."""
    import triton

    driver = Path("/proc/driver/nvidia/version")
    with contextlib.suppress(OSError):
        version = driver.read_text().splitlines()[0]
        return f"{torch.cuda.get_device_name()}, {version}, torch {torch.__version__}, triton {triton.__version__}"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"


@functools.cache
def sources() -> str:
    """A hash of our kernels' sources, and of the step that they are compared with."""
    from sae_sweep.saes import train

    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(train.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def main() -> None:
    """Answer the check that comes as JSON on stdin from the process that started this one."""
    from sae_sweep.kernels.cuda.backend import CudaBackend

    try:
        check = Check.from_json(sys.stdin.read())
        torch.zeros(1, device=check.device)
    except (UserError, RuntimeError):  # a penalty that the other process alone knows; a GPU that takes one process
        print(ANSWER + UNABLE, flush=True)
        return
    print(ANSWER + compare(check, CudaBackend), flush=True)


if __name__ == "__main__":
    main()
