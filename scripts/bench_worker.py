"""One side of scripts/bench_peers.py, in a process of its own: JSON lines in, JSON lines out.

    python scripts/bench_worker.py BACKEND --threads N      (BACKEND: floor, sae-sweep, sae-lens, dictionary-learning)

Requests: {"load": WORK, "start": FILE}, {"train": STEPS}, {"save": FILE}, {"measure": true}, {"end": true}. What is
between a load and an end happens in a process forked for it, with fresh memory, so that a backend is imported once.
Needs torch and the backend alone, so that it runs in an environment that has nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

os.environ["TQDM_DISABLE"] = "1"

import torch
from torch import Tensor

# Activations: sums of a few of twice as many known directions as would fit, scaled to E‖x‖² = d.
FEATURES_PER_DIMENSION, ACTIVE, DATA_SEED = 4, 4, 20
# Batches that training cycles through, and the seed of the one that quality is measured on.
BATCHES, HELD_OUT = 8, 10**6
# Inputs that thresholds of a start are taken from, and how many of its spare latents fire on an input.
THRESHOLD_INPUTS, SPARE_L0 = 1 << 14, 4
# Numbers in the largest tensor of a measurement or of the floor.
LARGEST = 1 << 26


@dataclass(frozen=True)
class Work:
    """SAEs to train: every width with every sparsity (penalty and coefficient; for topk and batchtopk `k`)."""

    name: str
    architecture: str
    widths: tuple[int, ...]
    sparsities: tuple[tuple[str, float], ...]
    k: int
    d: int
    batch: int
    lr: float

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Work:
        """Lists back into tuples."""
        sparsities = tuple((name, value) for name, value in fields["sparsities"])
        return cls(**{**fields, "widths": tuple(fields["widths"]), "sparsities": sparsities})

    def saes(self) -> list[tuple[int, str, float]]:
        """Width, penalty and coefficient of each."""
        return [(width, *sparsity) for width in self.widths for sparsity in self.sparsities]


@dataclass(frozen=True)
class Sae:
    """Parameters in the layout of sae-sweep: pre = W_enc·x + b_enc, x̂ = z·W_dec + b_dec; W_enc, W_dec [width, d]."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor


def batch(d: int, size: int, active: int, seed: int) -> Tensor:
    """Activations [size, d] with so many active features each."""
    features = torch.nn.functional.normalize(
        torch.randn(FEATURES_PER_DIMENSION * d, d, generator=torch.Generator().manual_seed(DATA_SEED)), dim=1
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(size, len(features), generator=generator).topk(active, dim=1).indices
    x = ((0.5 + torch.rand(size, active, 1, generator=generator)) * features[chosen]).sum(1)
    return x * (d / (active * 13 / 12)) ** 0.5  # E(½ + u)² = 13/12


def exemplar_start(width: int, d: int) -> Sae:
    """Latents of unit decoders that look along exemplars.

    Twice as many as there are features, at most, along activations of one feature: they fire above half of its usual
    size. The others along whole activations, each above what all but a few of its inputs reach: at any width as many
    fire on an input.
    """
    single = min(width, 2 * FEATURES_PER_DIMENSION * d)
    usual = d**0.5 / ACTIVE**0.5
    exemplars = torch.cat([batch(d, single, 1, HELD_OUT + 1), batch(d, width - single, ACTIVE, HELD_OUT + 2)])
    directions = torch.nn.functional.normalize(exemplars, dim=1)
    inputs = batch(d, THRESHOLD_INPUTS, ACTIVE, HELD_OUT + 3)
    rank = max(1, round(len(inputs) * SPARE_L0 / width))
    reached = [(inputs @ rows.T).topk(rank, dim=0).values[-1] for rows in directions[single:].split(1 << 13)]
    return Sae(directions.clone(), directions, -torch.cat([torch.full((single,), usual / 2), *reached]), torch.zeros(d))


def unit(sae: Sae) -> Sae:
    """The same function with decoders of norm 1, which one of the libraries insists on."""
    norms = sae.W_dec.norm(dim=1)
    return Sae(sae.W_enc * norms[:, None], sae.W_dec / norms[:, None], sae.b_enc * norms, sae.b_dec.clone())


class Backend(Protocol):
    """Trains the SAEs of one work, cycling through the same batches wherever it runs."""

    def train(self, steps: int) -> None:
        """So many steps of every SAE."""
        ...

    def saes(self) -> list[Sae]:
        """What it has come to, in the order of Work.saes."""
        ...


class Floor:
    """No training: the encoder product of every SAE, into memory that is already there."""

    def __init__(self, work: Work, starts: dict[int, Sae], threads: int) -> None:
        torch.set_num_threads(threads)
        self.data = [batch(work.d, work.batch, ACTIVE, seed) for seed in range(BATCHES)]
        self.encoders = [starts[width] for width, *_ in work.saes()]
        self.columns = LARGEST // work.batch
        self.out = torch.empty(work.batch * min(self.columns, max(work.widths)))

    def train(self, steps: int) -> None:
        for x in itertools.islice(itertools.cycle(self.data), steps):
            for sae in self.encoders:
                for weights, bias in zip(sae.W_enc.split(self.columns), sae.b_enc.split(self.columns), strict=True):
                    out = self.out[: len(x) * len(bias)].view(len(x), len(bias))
                    torch.addmm(bias, x, weights.T, out=out)

    def saes(self) -> list[Sae]:
        return []


class SaeSweep:
    """Stacks of equal width, as the planner makes them."""

    def __init__(self, work: Work, starts: dict[int, Sae], threads: int) -> None:
        from sae_sweep.config.settings import Penalty, Point, Training, canonical
        from sae_sweep.config.settings import Sae as Shape
        from sae_sweep.saes.parameters import Parameters
        from sae_sweep.saes.stack import Stack
        from sae_sweep.sweep.backend import pick_backend

        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        training = Training(10**6, work.batch, work.lr, lr_warmup=0, lr_decay=0, clip=1.0)
        self.data = torch.stack([batch(work.d, work.batch, ACTIVE, seed) for seed in range(BATCHES)])
        self.step, self.stacks = 0, []
        for width in work.widths:
            shape = Shape(work.architecture, "random", width, k=work.k)
            points = [
                canonical(Point(sae=shape, penalty=Penalty(name, value), training=training))
                for name, value in work.sparsities
            ]
            start = Parameters(**vars(starts[width]), threshold=torch.zeros(()))
            stack = Stack.start(points, [start] * len(points), "cpu")
            self.stacks.append((stack, pick_backend(stack, pool, threads)))

    def train(self, steps: int) -> None:
        left = steps
        while left:
            first = self.step % BATCHES
            data = self.data[first : first + left]
            for stack, backend in self.stacks:
                backend.advance(stack, data)
            self.step += len(data)
            left -= len(data)

    def saes(self) -> list[Sae]:
        views = [stack.parameters(i) for stack, _ in self.stacks for i in range(len(stack.points))]
        return [Sae(v.W_enc, v.W_dec, v.b_enc, v.b_dec) for v in views]


class SaeLens:
    """SAETrainer for one SAE, MultiSAETrainer for more; L1 whatever the penalty asked for."""

    def __init__(self, work: Work, starts: dict[int, Sae], threads: int) -> None:
        from sae_lens import registry
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.multi_sae_trainer import MultiSAETrainer
        from sae_lens.training.sae_trainer import SAETrainer

        torch.set_num_threads(threads)
        kind = {"relu": "standard"}.get(work.architecture, work.architecture)
        sae_class, config_class = registry.get_sae_training_class(kind)
        models = {}
        for number, (width, _, coefficient) in enumerate(work.saes()):
            own = {"l1_coefficient": coefficient} if kind == "standard" else {"k": work.k}
            model = sae_class(config_class(d_in=work.d, d_sae=width, apply_b_dec_to_input=False, **own))
            start = starts[width]
            with torch.no_grad():
                model.W_enc.copy_(start.W_enc.T)
                for name in ("W_dec", "b_enc", "b_dec"):
                    getattr(model, name).copy_(getattr(start, name))
            models[str(number)] = model
        self.models, self.batch = list(models.values()), work.batch
        config = SAETrainerConfig(0, work.batch, lr=work.lr, lr_end=work.lr, logger=LoggingConfig(log_to_wandb=False))
        data = itertools.cycle(batch(work.d, work.batch, ACTIVE, seed) for seed in range(BATCHES))
        if len(models) == 1:
            self.trainer = SAETrainer(config, self.models[0], data)
        else:
            hooks = dict.fromkeys(models, "site")
            self.trainer = MultiSAETrainer(config, models, hooks, ({"site": x} for x in data))

    def train(self, steps: int) -> None:
        self.trainer.cfg.total_training_samples += steps * self.batch
        self.trainer.fit()

    def saes(self) -> list[Sae]:
        return [Sae(m.W_enc.detach().T, m.W_dec.detach(), m.b_enc.detach(), m.b_dec.detach()) for m in self.models]


class DictionaryLearning:
    """Its loop over a list of trainers, as in its trainSAE without logs; L1 whatever the penalty asked for.

    Its standard trainer of the April update, which weighs activations by decoder norms as the others do.
    """

    def __init__(self, work: Work, starts: dict[int, Sae], threads: int) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate as StandardTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        torch.set_num_threads(threads)
        kind = {"relu": StandardTrainer, "topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[work.architecture]
        self.data = [batch(work.d, work.batch, ACTIVE, seed) for seed in range(BATCHES)]
        # Not step 0, at which some trainers set b_dec anew.
        self.step, self.bias, self.trainers = 1, "bias" if work.architecture == "relu" else "b_dec", []
        for width, _, coefficient in work.saes():
            shape = {"activation_dim": work.d, "dict_size": width, "layer": 0, "lm_name": "", "device": "cpu"}
            own = {"l1_penalty": coefficient, "sparsity_warmup_steps": None}
            own = own if work.architecture == "relu" else {"k": work.k}
            trainer = kind(steps=10**6, lr=work.lr, warmup_steps=0, **shape, **own)
            start, sae = starts[width], trainer.ae
            with torch.no_grad():
                sae.encoder.weight.copy_(start.W_enc)
                sae.decoder.weight.copy_(start.W_dec.T)
                getattr(sae, self.bias).copy_(start.b_dec)
                sae.encoder.bias.copy_(start.b_enc + start.W_enc @ start.b_dec)  # it encodes x − b_dec
            self.trainers.append(trainer)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = self.data[(self.step - 1) % BATCHES]
            for trainer in self.trainers:
                trainer.update(self.step, x)
            self.step += 1

    def saes(self) -> list[Sae]:
        saes = []
        for sae in (trainer.ae for trainer in self.trainers):
            W_enc, W_dec, b_dec = sae.encoder.weight.detach(), sae.decoder.weight.detach().T, getattr(sae, self.bias)
            saes.append(Sae(W_enc, W_dec, (sae.encoder.bias - W_enc @ b_dec).detach(), b_dec.detach()))
        return saes


BACKENDS = {
    "floor": Floor,
    "sae-sweep": SaeSweep,
    "sae-lens": SaeLens,
    "dictionary-learning": DictionaryLearning,
}


MODULES = {
    "floor": "torch",
    "sae-sweep": "sae_sweep.kernels.cpu.backend",
    "sae-lens": "sae_lens.training.multi_sae_trainer",
    "dictionary-learning": "dictionary_learning.trainers",
}


@torch.no_grad()
def quality(work: Work, sae: Sae) -> tuple[float, float]:
    """FVU and L0 on the batch held out, measured alike for every backend."""
    x = batch(work.d, work.batch, ACTIVE, HELD_OUT)
    norms, least = sae.W_dec.norm(dim=1), torch.tensor(0.0)
    pieces = x.split(max(1, LARGEST // len(norms)))
    if work.architecture == "batchtopk":
        best = torch.empty(0)
        for piece in pieces:
            contributions = (torch.addmm(sae.b_enc, piece, sae.W_enc.T) * norms).flatten()
            best = torch.cat([best, contributions]).topk(min(work.k * len(x), len(best) + contributions.numel())).values
        least = best[-1]
    error = active = 0.0
    for piece in pieces:
        codes = torch.addmm(sae.b_enc, piece, sae.W_enc.T).relu_()
        if work.architecture != "relu":
            contributions = codes * norms
            if work.architecture == "topk":
                least = contributions.topk(work.k, dim=1).values[:, -1:]
            codes *= contributions >= least
        error += float((torch.addmm(sae.b_dec, codes, sae.W_dec) - piece).square().sum())
        active += float(codes.count_nonzero())
    return error / float((x - x.mean(0)).square().sum()), active / len(x)


def reset_peak() -> None:
    """Let the high-water mark of this process's memory start anew, where there is a /proc."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def serve(backend: str, threads: int, request: dict[str, Any], answers: TextIO) -> None:
    """Load what is asked for, then answer requests until the one to end."""
    before, work = resident_bytes("VmRSS"), Work.from_json(request["load"])
    saved = torch.load(request["start"]) if request["start"] else {}
    starts = {width: Sae(**saved[width]) if saved else exemplar_start(width, work.d) for width in work.widths}
    trained = BACKENDS[backend](work, starts, threads)
    # One thread by the processor's time, which others on the machine do not lengthen.
    clock = time.process_time if threads == 1 else time.perf_counter
    answer: dict[str, Any] = {}
    while "end" not in request:
        print(json.dumps(answer), file=answers, flush=True)
        request, answer = json.loads(sys.stdin.readline()), {}
        if "train" in request:
            began = clock()
            trained.train(request["train"])
            answer["seconds"] = clock() - began
        elif "save" in request:
            saes = zip(work.widths, map(unit, trained.saes()), strict=True)
            torch.save({width: vars(sae) for width, sae in saes}, request["save"])
        elif "measure" in request:
            answer["peak_bytes"] = resident_bytes("VmHWM") - before
            answer["quality"] = [quality(work, sae) for sae in trained.saes()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    # Libraries may print: what is read is the real standard output, theirs goes to standard error.
    answers, sys.stdout = sys.stdout, sys.stderr
    importlib.import_module(MODULES[args.backend])  # no part of what training takes
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    while line := sys.stdin.readline():
        if not os.fork():
            serve(args.backend, args.threads, json.loads(line), answers)
            os._exit(0)
        status = os.wait()[1]
        if status:
            return os.waitstatus_to_exitcode(status)
        print("{}", file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
