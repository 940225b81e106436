"""What is installed is whole: the wheel alone, away from the checkout, plans and runs every experiment."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sae_sweep.config.axes import listing
from sae_sweep.config.files import conf_dir

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    # Where the build back-end is there already, nothing has to be downloaded.
    isolation = ["--no-isolation"] if find_spec("hatchling") else []
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(place), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    place = tmp_path_factory.mktemp("site-packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(place), str(wheel)], check=True, capture_output=True)
    return place


def run(installed: Path, cwd: Path, *commands: list[str]) -> list[dict[str, Any]]:
    """The JSON of commands of the installed package, one after the other; the checkout is not on its path."""
    code = (
        "import json, sys, sae_sweep\n"
        f"assert sae_sweep.__file__.startswith({str(installed)!r}), sae_sweep.__file__\n"
        "from sae_sweep.cli.app import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['sae-sweep', *words]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, words"
    )
    end = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert end.returncode == 0, end.stderr
    return [json.loads(line) for line in end.stdout.splitlines()]


def test_the_wheel_holds_the_package_its_configuration_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    conf = {f"sae_sweep/conf/{path.relative_to(conf_dir())}" for path in conf_dir().rglob("*.yaml")}
    package = (path for path in (CHECKOUT / "sae_sweep").rglob("*") if path.is_file())
    ours = {str(path.relative_to(CHECKOUT)) for path in package if "__pycache__" not in path.parts}
    assert inside == conf | ours
    assert {f"sae_sweep/conf/experiment/{name}.yaml" for name in listing("experiment")} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow  # the largest grids take half a minute to lay out
def test_it_plans_the_quickstart_and_every_experiment(installed: Path, tmp_path: Path) -> None:
    names = listing("experiment")
    plans = run(installed, tmp_path, ["plan", "--json"], *(["plan", "--json", f"experiment={name}"] for name in names))
    expected = plans.pop(0)
    assert (expected["schema"], expected["sweep"], expected["finished"]) == (1, "quickstart", 0)
    assert expected["points"] > 16
    for found, name in zip(plans, names, strict=True):
        assert found["sweep"] == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # its kernels are compiled anew
def test_it_runs(installed: Path, tmp_path: Path) -> None:
    tiny = ["toy=small", "toy.d_vocab=5", "toy.k=2", "toy.steps=30", "training.steps=25", "sae.width=5", "logger=none"]
    (found,) = run(installed, tmp_path, ["run", "--json", *tiny, "penalty.coefficient=1", "name=tiny"])
    assert (found["ran"], found["failed"]) == (1, 0)
    assert (tmp_path / found["directory"] / "results.parquet").is_file()
    record = json.loads(next(tmp_path.glob("outputs/points/*/record.json")).read_text())
    assert record["provenance"]["git_sha"] is None  # not that of whatever repository it is installed in


@pytest.mark.slow  # its kernels are compiled anew
@pytest.mark.timeout(1800)
def test_five_minutes_from_an_idea_to_a_verdict(installed: Path, tmp_path: Path) -> None:
    """The README's own words, typed into an empty folder."""
    readme = (CHECKOUT / "README.md").read_text()
    section = readme.partition("## Your own idea in five minutes")[2].partition("\n## ")[0]
    script, result = re.findall(r"^```\w*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    folder, programs = tmp_path / "empty", tmp_path / "bin"
    folder.mkdir(), programs.mkdir()
    program = programs / "sae-sweep"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m sae_sweep "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(installed), "PATH": f"{programs}:{os.environ['PATH']}"}
    end = subprocess.run(["bash", "-e"], input=script, cwd=folder, env=environment, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert "normalisable for no λ" in end.stdout and "8 (0 finished)" in end.stdout and "warning" not in end.stderr
    # What the README says came of it, but for the last digits, which another processor may have otherwise.
    said, expected = (" ".join(text.split()) for text in (end.stdout, result))
    first, _, rest = expected.partition(" is 0")
    assert first in said and rest[rest.index("), not at most") :] in said
    assert "answers 100% of its inputs right" in end.stderr
