"""Train max-of-K toys by the published recipe and compare their exact accuracy and loss with the published figures.

    python scripts/toy_accuracy.py [--seeds 50] [--device cpu]

d_vocab 64, K 4, every toy evaluated on all 64^4 inputs. Prints a Markdown table; exits with 1 if a mean over the seeds
is more than three standard errors from the published one (Compact Proofs, arXiv 2406.11779: 150 seeds).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sae_sweep.config.settings import Toy
from sae_sweep.toys.max_of_k import MaxOfK, train


@dataclass(frozen=True)
class Published:
    """Mean and standard deviation over the published seeds."""

    mean: float
    sd: float
    seeds: int = 150


ACCURACY = Published(0.99916, 0.00148)
LOSS = Published(0.0044, 0.0079)
LIMIT = 3.0


def standard_errors(values: Sequence[float], published: Published) -> float:
    """How far the two means are apart, in standard errors of their difference: √(s²/n + s_pub²/n_pub)."""
    error = math.sqrt(statistics.variance(values) / len(values) + published.sd**2 / published.seeds)
    return abs(statistics.mean(values) - published.mean) / error


def row(name: str, values: Sequence[float], published: Published) -> str:
    """One line of the table."""
    mean, sd, median = statistics.mean(values), statistics.stdev(values), statistics.median(values)
    return (
        f"| {name} | {mean:.5f} ± {sd:.5f} | {median:.5f} | {min(values):.5f} to {max(values):.5f} "
        f"| {published.mean} ± {published.sd} | {standard_errors(values, published):.2f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50, help="toys to train, at least 2 (default 50)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: one toy has no spread")

    started = time.perf_counter()
    toys = [Toy(seed=seed) for seed in range(args.seeds)]
    trained = train(
        toys, args.device, lambda step, loss: print(f"\rstep {step}: loss {loss:.4f}", end="", file=sys.stderr)
    )
    seconds = time.perf_counter() - started
    print(f"\n{args.seeds} toys in one stack: {seconds:.0f} s", file=sys.stderr)
    results = []
    for toy, params in zip(toys, trained, strict=True):
        results.append(MaxOfK(toy, params).to(args.device).evaluate_exact())
        print(f"seed {toy.seed}: accuracy {results[-1].accuracy:.5f}, loss {results[-1].loss:.5f}", file=sys.stderr)
    accuracy, loss = [r.accuracy for r in results], [r.loss for r in results]

    titles = (f"{args.seeds} seeds, all 64⁴ inputs", "mean ± sd", "median", "range", "published (150 seeds)")
    print("| " + " | ".join([*titles, "standard errors apart"]) + " |")
    print("|---|---|---|---|---|---|")
    print(row("accuracy", accuracy, ACCURACY))
    print(row("loss (nats)", loss, LOSS))
    return int(max(standard_errors(accuracy, ACCURACY), standard_errors(loss, LOSS)) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
