"""Kinds from another package: a wheel with a toy, an architecture, a penalty and a metric is installed, swept,
resumed, reported and run as a Slurm task; no file of ours names what is in it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commandline import fresh, fresh_in_turn

ROOT = Path(__file__).resolve().parents[1]
SOURCE = '''
from sae_sweep import Architecture, Column, Metric, PenaltyFormula, Setting, ToyKind, register
from sae_sweep.lazy import lazy
from sae_sweep.toys.classes import FeatureCells, count_pairs
from sae_sweep.toys.planted import Synthetic, features, planted_kind

torch = lazy("torch")


class Dice(Synthetic):
    """One of several faces, the first of them more often by `bias`."""

    def __init__(self, toy, params):
        super().__init__(toy, params)
        self.cells = FeatureCells(toy.features)

    @property
    def chance(self):
        import numpy as np

        chance = np.ones(self.toy.features)
        chance[0] += self.toy.bias
        return chance / chance.sum()

    def draw(self, count, generator):
        faces = torch.multinomial(torch.as_tensor(self.chance), count, replacement=True, generator=generator)
        return torch.nn.functional.one_hot(faces, self.toy.features).float()

    def cell(self, inputs):
        return inputs.argmax(1)


register(
    planted_kind(
        lambda: Dice,
        lambda partition, toy: count_pairs(partition, toy.features, 1),
        name="dice",
        description="one of several faces",
        settings={**features(6, 8), "bias": Setting(0.5, "of the first face", ge=0)},
    )
)


def shrunk(pre, sae, settings, training):
    return (pre.relu() - settings.margin_of_fire * sae.gain.sigmoid()[..., None, :]).relu()


register(
    Architecture(
        name="shrunk",
        description="ReLU less a learned margin",
        activate=shrunk,
        formula="max(max(pre, 0) - m·sigmoid(gain), 0)",
        prior="that of its penalty",
        settings={"margin_of_fire": Setting(0.1, ge=0)},
        extras=("gain",),
        completed=lambda sae, width: sae.replace(gain=sae.b_enc.new_zeros(width)),
    )
)
register(
    PenaltyFormula(
        name="saturating",
        description="approaches 1 as a grows",
        formula="a/(a + s)",
        prior="improper",
        settings={"scale": Setting(1.0, gt=0)},
        ladder=(0.1, 0.2, 0.4, 0.8),
    )
)


def largest_row(measured):
    return {"largest_row": float(measured.sae.W_dec.norm(dim=1).max())}


COLUMNS = {"largest_row": Column("norm")}
register(Metric(name="largest_row", description="norm", columns=COLUMNS, measure=largest_row))
'''
WORDS = ["run", "toy=dice", "toy.bias=0.5,2", "sae=shrunk", "sae.margin_of_fire=0.05", "sae.width=6"]
WORDS += ["penalty=saturating", "penalty.coefficient=0.1,0.4", "penalty.scale=2", "training.steps=25"]
WORDS += ["training.batch_size=32", "evaluation.inputs=600", "logger=none", "name=thrown"]


def wheel(place: Path, version: str = "1.2") -> Path:
    """A wheel is an archive with an index: nothing is needed to build one by hand."""
    about = f"dice_for_saes-{version}.dist-info"
    files = {
        "dice_for_saes.py": SOURCE,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: dice-for-saes\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": "[sae_sweep.plugins]\ndice = dice_for_saes\n",
    }
    lines = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(text.encode())}")
    files[f"{about}/RECORD"] = "\n".join([*lines, f"{about}/RECORD,,"]) + "\n"
    path = place / f"dice_for_saes-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package."""
    place = tmp_path_factory.mktemp("site-packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*command, str(wheel(tmp_path_factory.mktemp("wheel")))], check=True, capture_output=True)
    return place


def with_code(site: Path, code: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code where the package is installed."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_kinds_of_another_package_are_swept_resumed_reported_and_run_as_tasks(site: Path, tmp_path: Path) -> None:
    commands = [["penalties", "--json"], [*WORDS, "--json"], [*WORDS, "--json"]]
    commands += [["results", "thrown", "--format", "json"], ["report", "thrown"]]
    listed, end, again, table, report = fresh_in_turn(*commands, cwd=tmp_path, env={"PYTHONPATH": f"{site}:{ROOT}"})
    (own,) = [row for row in json.loads(listed.out) if row["name"] == "saturating"]
    assert own["ladder"] == [0.1, 0.2, 0.4, 0.8]
    assert end.code == 0, end.err
    assert (json.loads(end.out)["points"], json.loads(end.out)["ran"]) == (4, 4)
    assert again.code == 0 and json.loads(again.out)["ran"] == 0, again.err
    rows = json.loads(table.out)
    assert [row["penalty"] for row in rows] == ["saturating"] * 4
    assert all(row["largest_row"] > 0 and row["toy"] == "dice-6-8" for row in rows)
    assert {row["toy.bias"] for row in rows} == {0.5, 2.0}
    assert report.code == 0, report.err

    # As a task of a cluster's job.
    task = {"sweep": "sent", "output_dir": str(tmp_path / "sent"), "device": "cpu", "logger": {"name": "none"}}
    task |= {"job_name": "sent", "checkpoint_seconds": 60, "fail_fast": False}
    path = tmp_path / "task-0.json"
    path.write_text(json.dumps(task))
    run = "import sys; from sae_sweep.slurm.task import main; main(sys.argv[1:2])"
    write = (
        "import json, sys; from pathlib import Path; from sae_sweep.config import overrides; "
        "from sae_sweep.slurm.tasks import to_json; sweep = overrides.load(sys.argv[2:]); path = Path(sys.argv[1]); "
        "path.write_text(json.dumps({**json.loads(path.read_text()), 'points': to_json(sweep.points), "
        "'evaluation': sweep.evaluation.to_dict()}))"
    )
    code = with_code(site, f"{write}\n{run}", tmp_path, str(path), *WORDS[1:])
    assert code.returncode == 0, code.stderr
    points = sorted(place.name for place in (tmp_path / "outputs/points").iterdir())
    assert sorted(place.name for place in (tmp_path / "sent/points").iterdir()) == points

    # Without the package, one line that names it.
    for end in fresh_in_turn(WORDS, ["report", "thrown"], ["results", "thrown"], cwd=tmp_path):
        assert (end.code, end.out, end.err.count("\n")) == (2, "", 1), end.err
        assert "comes from the package dice-for-saes 1.2, which is not installed here" in end.err
    node = with_code(tmp_path, run, tmp_path, str(path))
    assert node.returncode == 2 and "from the package dice-for-saes 1.2" in node.stderr, node.stderr


def test_the_packages_version_is_in_the_identity(site: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(later)]
    subprocess.run([*command, str(wheel(tmp_path, "1.3"))], check=True, capture_output=True)
    code = (
        "from sae_sweep.config.settings import Penalty, Point, Toy, toy_id\n"
        "print(Point(penalty=Penalty('saturating')).id, toy_id(Toy('dice')), Point().id)"
    )

    def ids(place: Path) -> list[str]:
        return with_code(place, code, tmp_path).stdout.split()

    before, after = ids(site), ids(later)
    assert before[0] != after[0] and before[1] != after[1] and before[2] == after[2]


def test_a_plugin_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    place = tmp_path / "site"
    about = place / "broken-0.1.dist-info"
    about.mkdir(parents=True)
    (place / "broken.py").write_text("import a_module_that_is_not_there\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[sae_sweep.plugins]\nbroken = broken\n")
    end = fresh("plan", "experiment=quickstart", cwd=tmp_path, env={"PYTHONPATH": f"{place}:{ROOT}"})
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1), end.err
    assert "the plugin broken of broken 0.1 cannot be loaded: ModuleNotFoundError" in end.err
