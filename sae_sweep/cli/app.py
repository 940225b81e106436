"""The command line: a face. Each command parses its arguments and calls one function elsewhere.

No heavy import at the top: `sae-sweep --help` must answer at once.
"""

import os
import shlex
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_sweep import environment, signals
from sae_sweep.errors import EnvironmentProblem, UserError


class _Commands(typer.core.TyperGroup):
    """Lists each command with all of its one sentence, which would be cut where the line ends."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in self.commands.items()])


app = typer.Typer(
    name="sae-sweep",
    cls=_Commands,
    help="Feature-splitting sweeps: train toy models and sparse autoencoders, count splits against exact ground truth.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing what draws boxes around help takes longer than all the rest of it
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Overrides are Hydra's: sae.width=16,128 penalty=l1,sqrt seed=range(0,3) experiment=splitting.\n\n"
    "Exit codes: 0 done, 2 usage or configuration, 3 finished with failed points, 4 environment, "
    "75 interrupted (resumable), 130 Ctrl-C (resumable).",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE[,VALUE…]]…", help="Hydra overrides; none: the quickstart.")
]
# Of commands that look at a toy.
OfToy = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE[,VALUE…]]…", help="Hydra overrides; none: toy=max_of_k.")
]


def _search_first(folders: list[Path] | None) -> None:
    from sae_sweep.config import files

    files.search_first(folders or [])


ConfigDir = Annotated[
    list[Path] | None,
    typer.Option(
        "--config-dir",
        metavar="DIR",
        callback=_search_first,
        help="A folder of experiment/, penalty/ and other groups of your own, before ./conf and ours; repeat for more.",
    ),
]
KindName = Annotated[str | None, typer.Argument(metavar="[NAME]", help="One of them: all about it.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Shard = Annotated[str | None, typer.Option(metavar="I/N", help="Only the points whose id ≡ I mod N, I from 0.")]
Full = Annotated[bool, typer.Option("--full", help="Print the whole report: every width and init, fronts, labels.")]
Yes = Annotated[bool, typer.Option("--yes", help="Let grids of more than 100,000 combinations through.")]
SweepName = Annotated[str, typer.Argument(metavar="SWEEP", help="Name of a sweep under the output directory.")]


def _no_link_to_nothing(path: Path) -> Path:
    link = environment.dangling(path)
    if link is not None:
        raise UserError(f"--output-dir {path}: {link} is a link to nothing")
    return path


OutputDir = Annotated[Path, typer.Option(help="Where sweeps lie.", callback=_no_link_to_nothing)]


def _examples(*lines: str) -> str:
    """The end of a command's help."""
    # \b: click does not wrap what follows.
    return "\n".join(["\b", "Examples:", *(f"  sae-sweep {line}" for line in lines)])


class TableFormat(StrEnum):
    """What `results` can print."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


class Aggregate(StrEnum):
    """How `results` can bring seeds together."""

    none = "none"
    mean = "mean"
    best = "best"


@app.command(
    epilog=_examples(
        "run experiment=splitting",
        'run toy=small sae.width=16,136 penalty=l1,sqrt "seed=range(0,3)" name=mine',
    )
)
def run(
    overrides: Overrides = None,
    shard: Shard = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failed point.")] = False,
    yes: Yes = False,
    json: Json = False,
    full: Full = False,
    config_dir: ConfigDir = None,
    cfg: Annotated[bool, typer.Option("--cfg", help="Print the resolved configuration as YAML, and stop.")] = False,
) -> None:
    """Plan a grid, train what is missing, count the splits, report: verdicts, the rows that matter, a page."""
    from sae_sweep.cli import run as commands

    if cfg:
        from sae_sweep.cli.experiments import print_configuration

        print_configuration(overrides or [], yes)
    elif dry_run:
        commands.plan(overrides or [], shard, yes, json, dry_run=True)
    else:
        raise typer.Exit(commands.run(overrides or [], shard, fail_fast, yes, commands.Output(json, full)))


@app.command(
    epilog=_examples(
        "plan experiment=pareto",
        "plan sae.width=64,256,1024 penalty=l1,log1p --json",
    )
)
def plan(
    overrides: Overrides = None,
    shard: Shard = None,
    yes: Yes = False,
    json: Json = False,
    config_dir: ConfigDir = None,
) -> None:
    """Axes, points, finished, packs, and an estimate of memory and time."""
    from sae_sweep.cli import run as commands

    commands.plan(overrides or [], shard, yes, json)


@app.command(
    epilog=_examples(
        "submit experiment=pareto launcher.partition=gpu",
        "submit experiment=pareto --dry-run",
    )
)
def submit(
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch script and the packs, and stop.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop all jobs at the first failed point.")] = False,
    yes: Yes = False,
    json: Json = False,
    config_dir: ConfigDir = None,
) -> None:
    """Send what is missing of a grid to Slurm as job arrays."""
    from sae_sweep.cli import slurm

    raise typer.Exit(slurm.submit(overrides or [], dry_run, fail_fast, yes, json))


@app.command(
    epilog=_examples(
        "status",
        "status pareto --watch",
    )
)
def status(
    sweep: Annotated[str | None, typer.Argument(metavar="[SWEEP]", help="Name of a sweep; none: all of them.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again until nothing is queued or running.")] = False,
    json: Json = False,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """Points finished, running, pending, failed and lost; the jobs; the time left."""
    from sae_sweep.cli import slurm

    slurm.status(sweep, watch, json, output_dir)


@app.command(
    epilog=_examples(
        "cancel pareto",
        "cancel pareto --output-dir /shared/outputs",
    )
)
def cancel(sweep: SweepName, output_dir: OutputDir = Path("outputs")) -> None:
    """Cancel the Slurm jobs of a sweep; finished points are kept."""
    from sae_sweep.cli import slurm

    slurm.cancel(sweep, output_dir)


@app.command(
    epilog=_examples(
        "logs pareto",
        "logs pareto 3f2a",
    )
)
def logs(
    sweep: SweepName,
    point: Annotated[str | None, typer.Argument(metavar="[POINT]", help="Id of a point, or how it begins.")] = None,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """What the tasks of a sweep wrote, or the one that holds a point."""
    from sae_sweep.cli import slurm

    slurm.logs(sweep, point, output_dir)


@app.command(
    epilog=_examples(
        "sync pareto",
        "sync pareto --json",
    )
)
def sync(sweep: SweepName, json: Json = False, output_dir: OutputDir = Path("outputs")) -> None:
    """Push to W&B what nodes without a network logged offline; once each, however often it is called."""
    from sae_sweep.cli import slurm

    slurm.sync(sweep, json, output_dir)


@app.command(
    epilog=_examples(
        "doctor",
        "doctor --output-dir /shared/outputs",
    )
)
def doctor(json: Json = False, output_dir: OutputDir = Path("outputs")) -> None:
    """GPU, output folder, Slurm, sacct, W&B: what works here, and what to do about the rest."""
    from sae_sweep.cli import slurm

    slurm.doctor(json, output_dir)


@app.command(
    epilog=_examples(
        "verify",
        "verify --output-dir /shared/outputs --json",
    )
)
def verify(json: Json = False, output_dir: OutputDir = Path("outputs")) -> None:
    """Read every byte that is stored; what is damaged is set aside, for the next run to recompute."""
    from sae_sweep.cli import run as commands

    raise typer.Exit(commands.verify(json, output_dir))


@app.command(
    epilog=_examples(
        "results quickstart --sort fvu --top 10 --where width=136",
        "results quickstart --format csv --seeds mean",
    )
)
def results(
    sweep: SweepName,
    format: Annotated[TableFormat, typer.Option(help="csv and json go to stdout as text, parquet as bytes.")] = (
        TableFormat.table
    ),
    seeds: Annotated[Aggregate, typer.Option(help="Aggregate over seeds: their mean, or the one of lowest loss.")] = (
        Aggregate.none
    ),
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="These columns; all: every one. None: about twelve that vary.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="[-]COLUMN", help="By this column; with a minus, downwards.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N rows.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="CONDITION", help="Such as width=16,136 or fvu<0.1; repeat for more.")
    ] = None,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """The one table of a sweep: in the terminal the columns that vary and matter, as csv, json or parquet all of it."""
    from sae_sweep.cli import show

    show.results(sweep, format.value, seeds.value, show.Choice(columns, sort, top, where or []), output_dir)


@app.command(
    epilog=_examples(
        "compare quickstart mine",
        "compare quickstart mine --output both.html --full",
    )
)
def compare(
    sweeps: Annotated[list[str], typer.Argument(metavar="SWEEP SWEEP…", help="Names of sweeps.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes; none: their names, in the current folder.")
    ] = None,
    json: Json = False,
    full: Full = False,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """Sweeps beside each other: one table, one front, one page, with a column that names the sweep."""
    from sae_sweep.cli import show

    show.compare(sweeps, output, json, full, output_dir)


@app.command(
    epilog=_examples(
        "report quickstart --full",
        "report quickstart --latents 3f2a --output page.html",
    )
)
def report(
    sweep: SweepName,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes; none: report.html in the sweep's folder.")
    ] = None,
    latents: Annotated[
        list[str] | None, typer.Option(metavar="POINT", help="A point whose latents to browse; repeat for more.")
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="The figures as PNG and SVG too; needs Chrome.")] = False,
    json: Json = False,
    full: Full = False,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """Verdicts and the rows that matter of a sweep, here; tables, figures and latents as report.html."""
    from sae_sweep.cli import show

    show.report(sweep, json, full, show.Page(output, latents or [], images), output_dir)


@app.command(
    epilog=_examples(
        "inspect 3f2a --sort -density --all",
        "inspect 3f2a --latent 5",
    )
)
def inspect(
    point: Annotated[str, typer.Argument(metavar="POINT", help="Id of a finished point, or how it begins.")],
    latent: Annotated[int | None, typer.Option(metavar="J", help="The card of one latent, counted from 0.")] = None,
    sort: Annotated[str | None, typer.Option(metavar="[-]COLUMN", help="By a column of latents.parquet.")] = None,
    whole: Annotated[bool, typer.Option("--all", help="Every live latent, not the first thirty.")] = False,
    json: Json = False,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """The latents of a trained SAE; with --latent, the cells of one and what it does to the logits."""
    from sae_sweep.cli import show

    show.inspect(point, latent, show.Order(sort, whole), json, output_dir)


@app.command(
    epilog=_examples(
        "dashboard quickstart",
        "dashboard quickstart --json",
    )
)
def dashboard(
    sweep: SweepName,
    json: Annotated[bool, typer.Option("--json", help="Print the views instead: no key is needed.")] = False,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """Build a sweep's W&B workspace: fronts, splits, labels, phases, the grid, the run table. A saved view each."""
    from sae_sweep.cli import show

    show.dashboard(sweep, json, output_dir)


@app.command(
    epilog=_examples(
        "cells toy=small toy.d_vocab=8 toy.k=3",
        "cells toy=planted toy.features=3 toy.tree=\"'0>1:0.2'\"",
    )
)
def cells(overrides: OfToy = None, json: Json = False) -> None:
    """The ground truth of a toy: its cells and every coarser partition; its planted features, with a picture."""
    from sae_sweep.cli import listings

    listings.cells(overrides or [], json)


@app.command(
    epilog=_examples(
        "variance toy=small",
        "variance toy=small site=pre_unembed,post_unembed penalty=l1 penalty.coefficient=0.1",
    )
)
def variance(overrides: OfToy = None, json: Json = False) -> None:
    """What a latent for each class of a partition explains of a toy and, given a penalty, costs: share and loss."""
    from sae_sweep.cli.variance import variance as measure

    measure(overrides or [], json)


@app.command(
    epilog=_examples(
        "score outputs/points/3f2a toy=small",
        "score my_sae toy=small site=post_unembed --json",
    )
)
def score(
    directory: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or file of weights of an SAE.")],
    overrides: OfToy = None,
    json: Json = False,
) -> None:
    """Measure an SAE on a toy: one of SAELens, dictionary_learning, sparsify or Gemma Scope, or one trained here."""
    from sae_sweep.cli.score import score as measure

    measure(directory, overrides or [], json)


@app.command(
    epilog=_examples(
        "toys",
        "toys planted",
    )
)
def toys(name: KindName = None, json: Json = False) -> None:
    """The toys there are, a line each; with a NAME its settings and what they mean."""
    from sae_sweep.cli import listings

    listings.toys(name, json)


@app.command(
    epilog=_examples(
        "penalties",
        "penalties log1p",
    )
)
def penalties(name: KindName = None, json: Json = False) -> None:
    """The penalties there are, a line each; with a NAME its formula, prior, slope at zero, ladder and source."""
    from sae_sweep.cli import listings

    listings.penalties(name, json)


@app.command(
    epilog=_examples(
        "prior log1p 2",
        "prior 'a/(a+s)' 1 --scale 2",
    )
)
def prior(
    penalty: Annotated[str, typer.Argument(metavar="PENALTY", help="A penalty's name, or a formula: 'a/(a+s)'.")],
    coefficients: Annotated[
        list[float] | None, typer.Argument(metavar="[COEFFICIENT]…", help="None: the penalty's ladder; a formula's: 1.")
    ] = None,
    outer: Annotated[str | None, typer.Option(help="What a formula's sum T enters: 'exp(T) - 1'.")] = None,
    scale: Annotated[float, typer.Option(help="penalty.scale, s in formulas.")] = 1.0,
    p: Annotated[float | None, typer.Option("--p", help="penalty.p, p in formulas.")] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Noise σ in each number: λ = coefficient/(2σ²). None: √½, so λ = coefficient.")
    ] = None,
    json: Json = False,
) -> None:
    """The prior that a penalty implies: density, normalisation, mean, tail and slope at zero, with a chart."""
    from sae_sweep.cli import prior as priors

    asked = priors.ask(penalty, coefficients or [], outer, scale, p, priors.SIGMA if sigma is None else sigma)
    priors.prior(asked, json)


@app.command(
    epilog=_examples(
        "architectures",
        "architectures topk",
    )
)
def architectures(name: KindName = None, json: Json = False) -> None:
    """The SAE architectures there are, a line each; with a NAME all about it."""
    from sae_sweep.cli import listings

    listings.architectures(name, json)


@app.command(
    epilog=_examples(
        "encoders",
        "encoders matching_pursuit",
    )
)
def encoders(name: KindName = None, json: Json = False) -> None:
    """The encoders there are, a line each; with a NAME all about it."""
    from sae_sweep.cli import listings

    listings.encoders(name, json)


@app.command(
    epilog=_examples(
        "recipes",
        "recipes resample",
    )
)
def recipes(name: KindName = None, json: Json = False) -> None:
    """What recipes are made of, optimisers, schedules, revival, …, a line each; with a NAME all about it."""
    from sae_sweep.cli import listings

    listings.recipes(name, json)


@app.command(
    epilog=_examples(
        "metrics",
        "metrics splits_per_max",
    )
)
def metrics(name: KindName = None, json: Json = False) -> None:
    """The metrics there are, a line each; with a NAME, or a column's, the columns of it and what they mean."""
    from sae_sweep.cli import listings

    listings.metrics(name, json)


@app.command(
    epilog=_examples(
        "experiments",
        "experiments splitting",
    )
)
def experiments(name: KindName = None, json: Json = False, config_dir: ConfigDir = None) -> None:
    """The experiments there are, yours and ours: what each asks, its claims, its points, how long, where from."""
    from sae_sweep.cli import experiments as listing

    listing.experiments(name, json)


@app.command(
    epilog=_examples(
        "init ideas",
        "init .",
    )
)
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder; what lies in it is never overwritten.")],
) -> None:
    """Write a starter: an experiment, a penalty, a plugin package and a notebook of your own."""
    from sae_sweep.cli import experiments as listing

    listing.init(directory)


class Shell(StrEnum):
    """Shells with completion."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


@app.command(
    epilog=_examples(
        "completion bash >> ~/.bashrc",
        "completion fish > ~/.config/fish/completions/sae-sweep.fish",
    )
)
def completion(shell: Shell) -> None:
    """Print what a shell reads to complete commands, keys, values and names: eval "$(sae-sweep completion bash)"."""
    from sae_sweep.cli.completion import script

    typer.echo(script(shell.value), nl=False)


def _version(value: bool) -> None:
    if value:
        from sae_sweep.version import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    pass


# click's UsageError; typer's versions keep click in different places.
_UsageError: Any = typer.BadParameter.__bases__[0]


def main() -> None:
    """Entry point: what the user or the machine did wrong is one line and an exit code."""
    # Hydra users type -m out of habit; every sweep here is a multirun.
    arguments = [word for word in sys.argv[1:] if word not in ("-m", "--multirun")]
    if (
        len(arguments) > 2 and arguments[0] == "complete"
    ):  # what a shell asks at each press of the tab key: no time to parse it
        from sae_sweep.cli.completion import answer

        print(answer(typer.main.get_command(app), arguments[1], arguments[2:]))
        return
    signals.raise_on_signals()
    _fill_closed_streams()
    try:
        signals.check()  # what came while this file was imported
        code = _run(arguments)
        signals.ignore_signals()
    except BaseException:
        signals.ignore_signals()
        stop = signals.received()
        if stop is None:
            raise
        again = shlex.join(["sae-sweep", *arguments])
        _say(f"interrupted: finished points are kept; resume with: {again}")
        # Not sys.exit: it would wait for worker threads, whose results nobody needs any more.
        os._exit(stop.exit_code)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Parse the arguments and run the command; returns the exit code."""
    try:
        environment.check_current_folder()
        code = app(arguments or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        return _refuse(str(error), error.exit_code)
    except _UsageError as error:
        return _refuse(error.format_message(), UserError.exit_code)
    # typer makes a SystemExit of a broken pipe: its reader has seen enough.
    except (BrokenPipeError, SystemExit):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        return _refuse(str(error), EnvironmentProblem.exit_code)
    # Outside packs, which are halved until they fit.
    except MemoryError:
        return _refuse("out of memory: finished points are kept", EnvironmentProblem.exit_code)
    return code or 0


def _fill_closed_streams() -> None:
    """Where a stream was closed (`2>&-`), the next file opened would take its number, and what C libraries print."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))


def _refuse(message: str, code: int) -> int:
    _say(f"error: {' '.join(message.split())}")
    return code


def _say(line: str) -> None:
    with suppress(OSError):  # nobody listens
        print(line, file=sys.stderr, flush=True)
