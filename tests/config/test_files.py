"""Options from files of the user's own: where they are looked for, what is read of them, what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_sweep.config import files
from sae_sweep.config.axes import listing
from sae_sweep.config.overrides import load
from sae_sweep.errors import UserError

EXPERIMENT = """
defaults:
  - override /toy: small
training:
  steps: 200
grid:
  axes:
    sae.width: [8, 16]
    penalty.coefficient: 1
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, and no folders named before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(files.VARIABLE, raising=False)
    yield
    files.search_first([])


def write(path: str, text: str, encoding: str = "utf-8") -> Path:
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(text.encode(encoding))
    return place


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_first_folder_that_has_an_option_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, steps in (("named", 1), ("variable", 2), ("conf", 3)):
        write(f"{folder}/experiment/quickstart.yaml", EXPERIMENT.replace("200", str(steps)))
    write("conf/experiment/own.yaml", EXPERIMENT)
    write("variable/penalty/gentle.yaml", "name: lp\np: 0.9\n")
    ours = files.conf_dir() / "experiment" / "quickstart.yaml"
    assert files.options("experiment")["quickstart"] == Path("conf/experiment/quickstart.yaml").resolve()
    assert files.options("experiment")["pareto"] == ours.with_name("pareto.yaml")
    monkeypatch.setenv(files.VARIABLE, "variable")
    assert files.options("experiment")["quickstart"] == Path("variable/experiment/quickstart.yaml").resolve()
    files.search_first(["named"])
    assert load(["experiment=quickstart"]).points[0].training.steps == 1
    assert {"own", "quickstart", "pareto"} <= set(listing("experiment")) and "gentle" in listing("penalty")
    sweep = load(["experiment=own", "penalty=gentle,l1"])
    assert [(point.penalty.name, point.penalty.get("p")) for point in sweep.points[::2]] == [("lp", 0.9), ("l1", None)]
    own = ("conf/experiment/own.yaml", "variable/penalty/gentle.yaml")
    assert set(sweep.files) == {str(Path(each).resolve()) for each in own}
    with pytest.raises(UserError, match="is no folder"):
        files.search_first(["missing"])


def test_another_projects_conf_is_let_be() -> None:
    write("conf/model/resnet.yaml", "depth: 3")
    assert files.folders() == [files.conf_dir()]


def test_any_option_may_be_a_path_and_paths_in_a_file_are_meant_from_its_folder() -> None:
    write("ideas/gentle.yaml", "name: lp\np: 0.9\n")
    write("ideas/tiny.yaml", "name: max_of_k\nd_vocab: 4\nk: 2\n")
    mine = EXPERIMENT.replace("/toy: small", "/toy: ./tiny.yaml") + "    penalty: [gentle.yaml, l1]\n"
    write("ideas/mine.yaml", mine)
    sweep = load(["experiment=./ideas/mine.yaml"])
    assert (sweep.name, sweep.experiment, len(sweep.points)) == ("mine", "mine", 4)
    assert {point.toy.d_vocab for point in sweep.points} == {4}
    assert {point.penalty.name for point in sweep.points} == {"lp", "l1"}
    assert sweep.files[str(Path("ideas/mine.yaml").resolve())] == mine
    both = load(["toy=small,./ideas/tiny.yaml", "penalty=./ideas/gentle.yaml", "penalty.coefficient=1"]).points
    assert [(point.toy.d_vocab, point.penalty.p) for point in both] == [(16, 0.9), (4, 0.9)]
    # What was composed is not kept when the file changes.
    write("ideas/gentle.yaml", "name: lp\np: 0.25\n")
    assert load(["toy=small", "penalty=./ideas/gentle.yaml", "penalty.coefficient=1"]).points[0].penalty.p == 0.25


def test_a_file_that_is_not_there_or_cannot_be_read_is_one_line() -> None:
    write("mine.yaml", EXPERIMENT)
    assert "did you mean 'mine.yaml'?" in refusal("experiment=mime.yaml")
    write("broken.yaml", "a: [1\nb: 2\n")
    assert "broken.yaml:2: " in refusal("experiment=broken.yaml")
    write("latin.yaml", "a: \u00e9", "latin-1")
    assert "save it as UTF-8" in refusal("experiment=latin.yaml")
    write("list.yaml", "[1, 2]")
    assert "must be a mapping" in refusal("experiment=list.yaml")
    write("far.yaml", "# @package elsewhere\n" + EXPERIMENT)
    assert "@package elsewhere is not used here" in refusal("experiment=far.yaml")
    write("unread.yaml", EXPERIMENT + "    penalty.p: [0.5, 1]\n")
    assert "experiment=unread.yaml: penalty.p is read by penalty=lp, lp_annealed, formula alone" in refusal(
        "experiment=unread.yaml"
    )
    # Where the command line took the use of it, it is let be.
    assert load(["experiment=unread.yaml", "penalty=sqrt"]).points
    # TopK brings a margin that an init from random directions does not read: nobody wrote it.
    write("topk.yaml", "# @package _global_\nsae:\n  architecture: topk\n  init: random\n")
    assert load(["experiment=topk.yaml"]).points
    write("mispelt.yaml", EXPERIMENT.replace("/toy:", "/toi:"))
    assert "there is no group 'toi' (did you mean 'toy'?" in refusal("experiment=mispelt.yaml")


# What users of Hydra bring


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("header", ["", "# @package _global_\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_header_a_byte_order_mark_and_other_ends_of_lines_matter_not(encoding: str, header: str, end: str) -> None:
    write("mine.yaml", (header + EXPERIMENT).replace("\n", end), encoding)
    found = load(["experiment=mine.yaml"]).points
    assert [(point.toy.d_vocab, point.training.steps, point.sae.width) for point in found] == [
        (16, 200, 8),
        (16, 200, 16),
    ]


@pytest.mark.parametrize(
    "mapping, chosen, other",
    [("encoder: {name: mlp}", "mlp", "linear"), ("sae: {architecture: gated}", "gated", "relu")],
)
def test_a_block_may_name_another_kind_than_the_mapping_of_its_file(mapping: str, chosen: str, other: str) -> None:
    group = mapping.partition(":")[0]
    blocks = f"  blocks:\n    - {group}: {other}\n    - {group}: {chosen}\n    - training.steps: 100\n"
    write("conf/experiment/two.yaml", EXPERIMENT.partition("grid:")[0] + f"{mapping}\ngrid:\n{blocks}")
    kinds = [
        point.encoder.name if group == "encoder" else point.sae.architecture
        for point in load(["experiment=two", "penalty.coefficient=1"]).points
    ]
    assert kinds == [other, chosen, chosen]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("encoder: {name: [linear, mlp]}", "encoder.name takes one value"),
        ("encoder: [linear, mlp]", "experiment=many: encoder takes one value"),
    ],
)
def test_a_list_of_kinds_outside_the_grid_is_refused_with_the_mend(given: str, said: str) -> None:
    write("conf/experiment/many.yaml", EXPERIMENT.partition("grid:")[0] + given)
    refused = refusal("experiment=many")
    assert said in refused and "(an axis is grid: {axes: {encoder: [NAME, NAME]}})" in refused


def test_a_kind_in_place_of_a_mapping_is_refused_with_the_mend() -> None:
    write("conf/experiment/short.yaml", EXPERIMENT + "encoder: mlp\n")
    assert "encoder must be a mapping, got 'mlp' (write encoder: {name: mlp})" in refusal("experiment=short")


def test_override_and_slash_may_be_left_out() -> None:
    write("mine.yaml", EXPERIMENT.replace("override /toy", "toy"))
    assert load(["experiment=mine.yaml"]).points[0].toy.d_vocab == 16


def test_a_list_in_the_defaults_is_refused_with_the_mend() -> None:
    write("mine.yaml", EXPERIMENT.replace("/toy: small", "/penalty: [l1, sqrt]"))
    assert "`grid: {axes: {penalty: [l1, sqrt]}}`" in refusal("experiment=mine.yaml")


def test_hydras_own_block_is_read_or_refused_by_name() -> None:
    params = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: range(0,3)\n      penalty: l1,sqrt\n"
    write("mine.yaml", params + EXPERIMENT)
    found = load(["experiment=mine.yaml"]).points
    assert len(found) == 3 * 2 * 2 and {point.penalty.name for point in found} == {"l1", "sqrt"}
    assert {point.seed for point in load(["experiment=mine.yaml", "seed=7"]).points} == {7}
    for block, message in (
        ("run: {dir: x}", "hydra.run.dir is Hydra's: output_dir is what it is called here"),
        ("job: {chdir: true}", "hydra.job.chdir is Hydra's: it has no meaning here: leave it out"),
        ("launcher: {partition: x}", "launcher.partition is what it is called here, with launcher: slurm"),
        ("sweeper: {n_jobs: 3}", "hydra.sweeper.n_jobs is Hydra's"),
    ):
        write("mine.yaml", f"hydra:\n  {block}\n" + EXPERIMENT)
        assert message in refusal("experiment=mine.yaml")
    write("mine.yaml", EXPERIMENT.replace("/toy: small", "hydra/launcher: submitit_slurm"))
    assert "write `override /launcher: slurm`" in refusal("experiment=mine.yaml")


def test_text_with_references_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "over there")
    monkeypatch.setenv("HOME", "/home/of-mine")
    write(
        "mine.yaml", EXPERIMENT + "output_dir: ~/${oc.env:PLACE}/${now:%Y}\nlauncher: {account: '${oc.env:X,none}'}\n"
    )
    sweep = load(["experiment=mine.yaml", "launcher=slurm", "launcher.setup=['cd ${HOME}']"])
    assert sweep.output_dir == Path("/home/of-mine/over there") / time.strftime("%Y")
    assert (sweep.launcher["account"], sweep.launcher["setup"]) == ("none", ["cd ${HOME}"])
    # As a shell hands it over that leaves the sign alone, which Hydra's grammar cannot read.
    typed = load(["toy=small", "penalty.coefficient=1", "output_dir=~/runs/${now:%Y}"])
    assert typed.output_dir == Path("/home/of-mine/runs") / time.strftime("%Y")


CASES = Path(__file__).parents[1] / "cases" / "hydra"


@pytest.mark.parametrize("name", ["bomcrlf", "nopackage"])
def test_a_file_as_hydra_users_bring_it_is_read(name: str) -> None:
    sweep = load([f"experiment={CASES / name}.yaml"])
    assert (len(sweep.points), sweep.points[0].toy.d_vocab, sweep.points[0].training.steps) == (8, 16, 200)
    assert sweep.varied == ["sae.width", "penalty.coefficient"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hydradir", "hydra.run.dir is Hydra's: output_dir is what it is called here"),
        ("listpenalty", "to sweep them write `grid: {axes: {penalty: [l1, sqrt]}}`"),
    ],
)
def test_a_file_of_hydra_that_would_mean_nothing_here_is_one_line(name: str, message: str) -> None:
    assert message in refusal(f"experiment={CASES / name}.yaml")
