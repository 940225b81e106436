"""From a command line to a sweep: presets, precedence, names, and one line for whatever is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_sweep.config import files
from sae_sweep.config import overrides as config
from sae_sweep.config.axes import listing
from sae_sweep.config.compose import compose
from sae_sweep.config.files import GROUPS, conf_dir
from sae_sweep.config.keys import point_keys, sweep_keys
from sae_sweep.config.logger import Logger
from sae_sweep.config.settings import PARTS, Evaluation, Point
from sae_sweep.errors import UserError
from sae_sweep.registry import kinds

ARCHITECTURES = tuple(kinds("architecture"))
PENALTIES = tuple(kinds("penalty"))

ONE = ["toy=small", "penalty.coefficient=1"]


def values(overrides: list[str], key: str) -> list[Any]:
    """The values of a dotted key over the points, in grid order, without repetition."""
    found = []
    for point in config.load(overrides).points:
        node: Any = point
        for name in key.split("."):
            node = getattr(node, name)
        found.append(node)
    return list(dict.fromkeys(found))


# What there is


@pytest.mark.parametrize("experiment", listing("experiment"))
def test_every_experiment_composes(experiment: str) -> None:
    sweep = config.load([f"experiment={experiment}"])
    assert sweep.name == sweep.experiment == experiment
    assert sweep.points
    assert sweep.claims
    assert len({point.id for point in sweep.points}) == len(sweep.points)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", listing("experiment"))
def test_every_experiment_composes_with_a_smaller_toy(experiment: str) -> None:
    sweep = config.load([f"experiment={experiment}"])
    if any(point.sae.init == "truth" for point in sweep.points):
        return  # there are planted features in no other toy
    small = config.load([f"experiment={experiment}", "toy=small", "toy.d_vocab=16", "training.steps=2", "seed=0"])
    assert {point.toy.d_vocab for point in small.points} == {16}


NEED_A_FILE = ("weights", "checkpoint", "activations")


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in PARTS for o in listing(g) if o not in NEED_A_FILE])
def test_every_option_composes_and_says_its_own_name(group: str, option: str) -> None:
    goes_with = {"l0": ["sae=jumprelu"], "matching_pursuit": ["sae=topk"]}.get(option, [])
    point = config.load([f"{group}={option}", "penalty.coefficient=1", *goes_with]).points[0]
    if group in ("site", "distribution"):
        assert getattr(point, group).name == option
    if group == "sae":
        assert point.sae.architecture == option
    if group == "encoder":
        assert point.encoder.name == option
    if group == "penalty":
        assert point.penalty.name == ("sqrt" if option == "lp" else option)


def test_there_is_an_option_for_every_penalty_and_its_ladder_is_geometric() -> None:
    ladders = config.ladders()
    assert set(ladders) == set(PENALTIES)
    for name, ladder in ladders.items():
        if name != "none":
            steps = [b / a for a, b in itertools.pairwise(ladder)]
            assert len(ladder) == 4
            # Thirds of a decade are written .03 .1 .3 1: 3 and 3.33.
            assert min(steps) > 1.9
            assert max(steps) / min(steps) < 1.2


def test_there_is_an_option_for_every_architecture() -> None:
    chosen = {name: config.load([f"sae={name}", "penalty.coefficient=1"]).points[0].sae for name in listing("sae")}
    assert {name: sae.architecture for name, sae in chosen.items()} == {name: name for name in ARCHITECTURES}


def test_the_fast_path_gives_what_hydra_composes() -> None:
    """Hydra composes once for an option and plain values go on plain dictionaries: the same point either way."""
    overrides = ["toy=small", "sae=topk", "penalty=tanh", "distribution=uniform", "site=post_unembed"]
    plain = ["sae.width=40", "sae.k=3", "sae.margin=0.2", "training.lr=0.01", "penalty.coefficient=0.7"]
    plain += ["toy.seed=3", "seed=5"]
    for changes in ([], ["sae=relu"], ["sae=relu", "penalty=log1p"]):
        groups = list({word.partition("=")[0]: word for word in [*overrides, *changes]}.values())
        for experiment in ([], ["experiment=pareto_paper"]):
            chosen = dict(word.split("=") for word in [*experiment, *groups])
            tree = compose(chosen).tree
            read = [word for word in plain if "sae=relu" not in groups or not word.startswith("sae.k=")]
            for word in read:
                key, _, value = word.partition("=")
                part, _, name = key.rpartition(".")
                (tree[part] if part else tree)[name] = yaml.safe_load(value)
            tree["penalty"].pop("ladder", None)
            parts = {name: kind(**tree[name]) for name, kind in PARTS.items()}
            expected = Point(**parts, seed=tree["seed"], data_seed=tree["data_seed"])
            found = config.load([*experiment, *groups, *read]).points
            assert {point.id for point in found} == {expected.id}


# Sweeping from the shell


def test_the_grammar_of_sweeps() -> None:
    assert values([*ONE, "sae.width=16,128"], "sae.width") == [16, 128]
    assert values([*ONE, "sae.width=choice(16,128)"], "sae.width") == [16, 128]
    assert values([*ONE, "seed=range(0,3)"], "seed") == [0, 1, 2]
    assert values([*ONE, "seed=range(6,0,-2)"], "seed") == [6, 4, 2]
    assert values([*ONE, "training.lr_decay=range(0.1,0.4,0.1)"], "training.lr_decay") == [0.1, 0.2, 0.3]
    assert values([*ONE, "penalty=glob(l*1*,exclude=lp*)"], "penalty.name") == ["l1", "log1p", "log1p_sq"]
    assert values([*ONE, "sae.init=glob(random*)"], "sae.init") == ["random", "random_unit", "random_scaled"]
    assert values([*ONE, "toy.seed=0,1", "seed=${toy.seed}"], "seed") == [0, 1]
    assert values([*ONE, "+seed=3", "++data_seed=4"], "seed") == [3]
    assert len(config.load(["-m", *ONE]).points) == len(config.load([*ONE, "--multirun"]).points) == 1


def test_a_coefficient_not_given_takes_its_penaltys_ladder() -> None:
    assert values(["penalty=sqrt"], "penalty.coefficient") == config.ladders()["sqrt"]
    assert values(["sae.width=8"], "penalty.coefficient") == config.ladders()["l1"]
    both = config.load(["penalty=pair,tanh"]).points
    expected = [(name, value) for name in ("pair", "tanh") for value in config.ladders()[name]]
    assert [(p.penalty.name, p.penalty.coefficient) for p in both] == expected
    assert values(["penalty=sqrt", "penalty.coefficient=3,4"], "penalty.coefficient") == [3.0, 4.0]


def test_keys_not_mentioned_take_their_single_default() -> None:
    point = config.load(["penalty.coefficient=1"]).points[0]
    expected = Point()
    assert point == dataclasses.replace(expected, sae=expected.sae.replace(width=point.toy.d_vocab))
    assert config.load(["seed=1"]).evaluation == Evaluation()


def test_settings_without_effect_collapse() -> None:
    assert len(config.load([*ONE, "sae=relu,topk", "sae.k=1,2"]).points) == 3
    assert len(config.load(["toy=small", "sae=topk", "penalty=l1,sqrt,tanh"]).points) == 1
    assert len(config.load([*ONE, "penalty=sqrt,lp"]).points) == 1


def test_a_file_of_weights_is_a_distribution(tmp_path: Path) -> None:
    file = tmp_path / "weights.csv"
    file.write_text("m,weight\n0,1\n")
    short = config.load([*ONE, f"distribution={file},uniform"]).points
    assert [(p.distribution.name, p.distribution.get("file")) for p in short] == [
        ("weights", str(file)),
        ("uniform", None),
    ]
    long = config.load([*ONE, "distribution=weights", f"distribution.file={file}"]).points
    assert long == short[:1]
    digest = short[0].distribution.digest
    file.write_text("m,weight\n0,2\n")
    assert config.load([*ONE, f"distribution={file}"]).points[0].distribution.digest != digest


# An experiment's grid


@pytest.fixture
def conf(tmp_path: Path) -> Iterator[Path]:
    """A folder to add experiments and other options to."""
    for group in GROUPS:
        (tmp_path / group).mkdir()
    files.search_first([tmp_path])
    yield tmp_path
    files.search_first([])


def write(conf: Path, text: str) -> list[str]:
    (conf / "experiment" / "trial.yaml").write_text("# @package _global_\n" + text)
    return ["experiment=trial"]


GRID = """
defaults:
  - override /toy: small
  - override /penalty: sqrt
training: {steps: 7}
grid:
  axes: {seed: [0, 1]}
  blocks:
    - {sae.width: "${cells:mq}", penalty.coefficient: [1, 2]}
    - {sae: topk, sae.width: 16, seed: 5}
"""


def test_blocks_are_a_union_of_products_times_the_axes(conf: Path) -> None:
    points = config.load(write(conf, GRID)).points
    found = [(p.sae.architecture, p.sae.width, p.penalty.name, p.penalty.coefficient, p.seed) for p in points]
    assert found == [
        ("relu", 136, "sqrt", 1.0, 0),
        ("relu", 136, "sqrt", 2.0, 0),
        ("relu", 136, "sqrt", 1.0, 1),
        ("relu", 136, "sqrt", 2.0, 1),
        ("topk", 16, "none", 0.0, 5),
    ]
    assert {p.training.steps for p in points} == {7}


CALIBRATED = """
defaults:
  - override /toy: small
grid:
  calibrate: l0
  coefficients: 3
  blocks:
    - {penalty: [l1, tanh]}
    - {penalty: l1, penalty.coefficient: [0.25, 7]}
    - {sae: topk}
"""


def test_an_experiment_may_have_its_ladders_calibrated(conf: Path) -> None:
    trial = write(conf, CALIBRATED)
    calibration = config.load(trial).calibration
    assert calibration is not None
    assert (calibration.l0_range, calibration.coefficients) == ((1, 4), 3)
    # Stand-ins for two ladders; what is given stays, also where it is a stand-in as well, and TopK has neither.
    rungs = [(p.penalty.name, p.penalty.coefficient) for p in calibration.rungs]
    assert [name for name, _ in rungs] == 3 * ["l1"] + 3 * ["tanh"]
    assert [point.penalty.coefficient for point in calibration.given] == [0.25]
    points = config.load(trial).points
    assert len(points) == 3 + 3 + 1 + 1 and 7 in {p.penalty.coefficient for p in points}
    # The shell has the last word.
    off = config.load([*trial, "grid.calibrate=null"])
    assert off.calibration is None and len(off.points) == 4 + 4 + 1 + 1
    other = config.load([*trial, "grid.l0_range=[2,3]"]).calibration
    assert other is not None and other.l0_range == (2, 3)


def test_the_shell_wins_over_axes_blocks_and_values(conf: Path) -> None:
    trial = write(conf, GRID)
    assert values([*trial, "seed=8,9"], "seed") == [8, 9]
    assert values([*trial, "training.steps=3"], "training.steps") == [3]
    widths = config.load([*trial, "sae.width=4", "seed=0", "penalty.coefficient=1"]).points
    assert [(p.sae.architecture, p.sae.width) for p in widths] == [("relu", 4), ("topk", 4)]
    assert values([*trial, "sae=relu"], "sae.architecture") == ["relu"]
    assert values([*trial, "penalty=tanh", "sae=relu"], "penalty.name") == ["tanh"]
    assert {p.toy.d_vocab for p in config.load([*trial, "toy=max_of_k"]).points} == {64}
    ladder = config.ladders()["sqrt"]
    assert values([*trial, "penalty.coefficient=null", "sae=relu"], "penalty.coefficient") == ladder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {axis: {}}", "axes and blocks"),
        ("grid: {blocks: {seed: 1}}", "trial"),
        ("grid: {axes: {seed: {a: 1}}}", "whole number"),
        ("grid: {blocks: [3]}", "must be a mapping"),
        ("grid: {blocks: [{sae.widht: 3}]}", "blocks[0]: unknown key 'sae.widht' (did you mean 'sae.width'?)"),
        ("grid: {axes: {penalty: [l1, sqr]}}", "did you mean 'sqrt'?"),
        ("grid: {axes: {seed: []}}", "seed has no values"),
        ("grid: {axes: {device: [cpu, cuda]}}", "one value for the whole sweep"),
        ("grid: {axes: {device: cpu}}", "no axis"),
        ("sae: {widht: 3}", "unknown key 'sae.widht' (did you mean 'width'?"),
        ("sae: 3", "trial"),
        ("sead: 3", "unknown key 'sead'"),
        ("sae: {width: wide}", "whole number"),
        ("penalty: {ladder: 3}", "must be a list"),
        ("penalty: {ladder: [-1]}", "at least 0"),
        ("evaluation: {inputs: 1}", "at least 16"),
        ("claims: [3]", "claims[0] must be a mapping"),
        ("claims: 3", "trial"),
        ("defaults: [override /toy: tiny]", "toy"),
        ("grid: [", "trial"),
    ],
)
def test_a_wrong_experiment_is_refused_in_one_line(conf: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(write(conf, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_may_not_reach_outside_its_group(conf: Path) -> None:
    file = conf / "penalty" / "mine.yaml"
    file.write_text("# @package _global_\nseed: 3\npenalty:\n  name: sqrt\n")
    with pytest.raises(UserError, match=r"mine\.yaml sets keys outside its group"):
        config.load(["penalty=l1,mine"])


# Names


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["logger=none"],
        ["device=cpu"],
        ["output_dir=elsewhere"],
        ["launcher=local"],
        ["logger.mode=offline"],
        ["-m"],
    ],
)
def test_without_an_override_of_the_grid_the_quickstart_is_meant(overrides: list[str]) -> None:
    sweep = config.load(overrides)
    assert sweep.experiment == sweep.name == "quickstart"
    assert [p.id for p in sweep.points] == [p.id for p in config.load(["experiment=quickstart"]).points]


def test_names() -> None:
    assert config.load(["name=mine"]).experiment == "quickstart"
    assert config.load(["name=mine"]).name == config.load(["name=mine", "seed=1"]).name == "mine"
    adhoc = config.load(["seed=1,2"])
    assert adhoc.experiment is None
    assert adhoc.name.startswith("adhoc-")
    assert config.load(["seed=2,1", "logger=none", "device=cpu"]).name == adhoc.name
    assert config.load(["seed=1,3"]).name != adhoc.name
    assert config.load(["seed=1,2", "evaluation.inputs=100"]).name != adhoc.name
    assert config.load(["experiment=quickstart", "seed=1"]).name.startswith("quickstart-")
    assert config.load(["experiment=quickstart", "logger=none"]).name == "quickstart"


def test_the_id_ignores_what_changes_no_number() -> None:
    ids = [point.id for point in config.load(ONE).points]
    for override in ("device=cpu", "output_dir=x", "logger=none", "name=x", "evaluation.inputs=99", "launcher=local"):
        assert [point.id for point in config.load([*ONE, override]).points] == ids
    assert [point.id for point in config.load([*ONE, "seed=1"]).points] != ids


def test_what_is_one_for_the_whole_sweep(tmp_path: Path) -> None:
    sweep = config.load(["seed=1", "evaluation.inputs=99", "device=cpu", f"output_dir={tmp_path}", "logger.project=x"])
    assert sweep.evaluation == Evaluation(inputs=99)
    assert (sweep.device, sweep.output_dir) == ("cpu", tmp_path)
    assert sweep.logger == {"name": "wandb", **vars(Logger(project="x"))}
    assert sweep.launcher["name"] == "local"
    assert sweep.overrides[0] == "seed=1"
    assert config.load(["logger=none"], ["logger=wandb"]).logger == {"name": "none"}
    assert config.load([], ["logger=none"]).logger == {"name": "none"}


def test_the_axes_of_a_sweep() -> None:
    sweep = config.load(["toy=small", "sae.width=8,4", "penalty=sqrt"])
    assert config.axes_of(sweep) == [("sae.width", [8, 4]), ("penalty.coefficient", config.ladders()["sqrt"])]


# Bad input

BAD = [
    ("penalty=l0", "did you mean sae=jumprelu?"),
    ("sae.widht=3", "did you mean 'sae.width'?"),
    ("width=3", "did you mean 'sae.width'?"),
    ("penalti=l1", "did you mean 'penalty'?"),
    ("penalty=sqr", "did you mean 'sqrt'?"),
    ("penalty=null", "did you mean 'none'?"),
    ("penalty=[l1,sqrt]", "l1, log1p"),
    ("experiment=quick", "did you mean 'quickstart'?"),
    ("experiment=quickstart,oracle", "one value"),
    ("quickstart", "did you mean 'experiment=quickstart'?"),
    ("sae.width", "key=value"),
    ("sae.width=abc", "whole number"),
    ("sae.width=16.0", "whole number"),
    ("sae.width=true", "whole number"),
    ("sae.width=", "whole number"),
    ("sae.width=[1,2]", "whole number"),
    ("sae.width=0", "at least 1, got 0"),
    ("toy.k=1", "at least 2, got 1"),
    ("penalty.coefficient=-1", "at least 0"),
    ("penalty.coefficient=1,null", "must be a number"),
    ("training.lr=inf", "finite"),
    ("training.lr=nan", "finite"),
    ("seed=99999999999999999999", "at most"),
    ("sae.width=" + "9" * 5000, "cannot read"),
    ("sae.width=interval(1,9)", "range() or choice()"),
    ("sae.width=choice()", "empty choice"),
    ("seed=range(0,0)", "empty"),
    ("seed=range(0,3,0)", "step that is not 0"),
    ("seed=range(0,inf)", "finite"),
    ("seed=range(0,1000000)", "--yes"),
    ("penalty=glob(z*)", "matches nothing"),
    ("seed=glob(*)", "matches nothing"),
    ("sae.width=1,,2", "cannot read"),
    ("output_dir=a b(", "cannot read"),
    ("sae.width=${sae.width}", "refers back"),
    ("~penalty", "deleted"),
    ("sae.width@x=3", "packages"),
    ("hydra.run.dir=x", "output_dir is what it is called here"),
    ("hydra/launcher=submitit_slurm", "with launcher=slurm"),
    ("hydra.launcher.partition=x", "launcher.partition is what it is called here, with launcher=slurm"),
    ("hydra.job.chdir=true", "leave it out"),
    ("launcher.partition=x", "give launcher=slurm too"),
    ("penalty.p=0.5", "penalty=lp, lp_annealed, formula alone"),
    ("sae.ridge=1", "is read by sae.init="),
    ("output_dir=${name}", "${oc.env:NAME} and ${now:%Y-%m-%d} are"),
    ("output_dir=${oc.env:NOT_SET_ANYWHERE}", "the environment has no NOT_SET_ANYWHERE"),
    ("experiment=./missing.yaml", "there is no such file"),
    ("penalty.name=l1", "give penalty="),
    ("sae.architecture=topk", "give sae="),
    ("penalty.ladder=[1]", "give penalty.coefficient="),
    ("distribution.digest=x", "unknown key"),
    ("grid.axes.sae.width=[8,16]", "an axis by itself is its key with its values"),
    ("grid.blocks=[]", "an axis by itself is its key with its values"),
    ("distribution=missing.csv", "No such file"),
    ("distribution=/", "directory"),
    ("distribution=weights", "needs distribution.file"),
    ("distribution.file=x.csv", "distribution=weights alone"),
    ("device=gpu", "did you mean 'cpu'?"),
    ("device=cpu,cuda", "one value"),
    ("name=a/b", "letters"),
    ("name=..", "letters"),
    ("output_dir=", "must be a word"),
    ("evaluation.inptus=9", "did you mean 'evaluation.inputs'?"),
    ("evaluation.inputs=1", "at least 16"),
    ("logger.projekt=x", "did you mean 'logger.project'?"),
    ("logger.mode=1", "must be a word"),
    ("launcher=slurn", "launcher cannot be"),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[word[:30] for word, _ in BAD])
def test_bad_input_is_one_line_that_names_the_nearest_valid_thing(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load([override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_key_given_twice_is_refused_but_a_commands_default_gives_way() -> None:
    with pytest.raises(UserError, match="given twice"):
        config.load(["seed=1", "seed=2"])
    assert values(["seed=1", *ONE], "seed") == [1]


def test_a_large_grid_needs_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*ONE, "seed=range(0,1001)", "data_seed=range(0,100)"]
    with pytest.raises(UserError, match=r"100,100 combinations, more than 100,000: pass --yes"):
        config.load(overrides)
    monkeypatch.setattr(config, "LARGEST_GRID", 100)
    overrides = [*ONE, "seed=range(0,21)", "data_seed=range(0,5)"]
    with pytest.raises(UserError, match=r"105 combinations, more than 100: pass --yes"):
        config.load(overrides)
    assert len(config.load(overrides, yes=True).points) == 105


def test_an_unwritable_output_directory(tmp_path: Path) -> None:
    config.check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        config.check_writable(tmp_path / "file" / "folder")
    # Root may write wherever permissions forbid it, but not here.
    with pytest.raises(UserError, match="cannot be written"):
        config.check_writable(Path("/proc/sae-sweep"))


KEYS = st.sampled_from([*point_keys(), *sweep_keys(), *GROUPS, "logger.mode", "launcher.x"])
ODD = "1 0 -1 1.5 true null l1 topk 1,2 range(0,3) choice(1,a) glob(*) ${toy.k} {a:1} [1,2] '${cells:mq}' 1e400 a/b.csv"
VALUES = st.text(max_size=12) | st.sampled_from([*ODD.split(), "interval(0,1)", "shuffle(1,2)", "int(3.2)"])
WORDS = st.text(max_size=20) | st.builds("{}={}".format, KEYS | st.text(max_size=8), VALUES)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=3))
def test_whatever_is_typed_either_loads_or_is_refused_in_one_line(words: list[str]) -> None:
    try:
        sweep = config.load(words)
    except UserError as error:
        assert str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 500
    else:
        assert sweep.points


def test_an_installed_package_carries_its_configuration(tmp_path: Path) -> None:
    """The layout of a wheel: conf/ inside the package, no checkout around it."""
    package = tmp_path / "site" / "sae_sweep"
    shutil.copytree(Path(config.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(conf_dir(), package / "conf")
    code = (
        "from sae_sweep.config import overrides; import sae_sweep; "
        "print(sae_sweep.__file__, len(overrides.load([]).points))"
    )
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == [str(package / "__init__.py"), str(len(config.load([]).points))]
