"""Completion: what may follow, and real key presses in bash, zsh and fish."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
import typer
from commandline import call

from sae_sweep.cli import app
from sae_sweep.cli.completion import candidates
from sae_sweep.config import overrides
from sae_sweep.config.keys import point_keys, sweep_keys
from sae_sweep.errors import UserError
from sae_sweep.registry import kinds, offered

INITS = offered("init")
PENALTIES = tuple(kinds("penalty"))

PROGRAM = typer.main.get_command(app.app)
SECONDS = 30


def offered(*words: str) -> list[str]:
    """What the last word may become."""
    return [each.text for each in candidates(PROGRAM, words[:-1], words[-1])]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two sweeps, of which one holds two points, and a point of neither."""
    for name, ids in (("quickstart", ["a1", "b2"]), ("wide", [])):
        (tmp_path / "outputs/sweeps" / name).mkdir(parents=True)
        (tmp_path / "outputs/sweeps" / name / "points.txt").write_text("\n".join([*ids, "# sha256: 0"]))
    for id in ("a1", "b2", "c3"):
        (tmp_path / "outputs/points" / id).mkdir(parents=True)
    (tmp_path / "weights.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What may follow


def test_commands_and_options() -> None:
    assert {"run", "plan", "status", "completion"} <= set(offered("")) and "complete" not in offered("")
    assert offered("re") == ["results", "report", "recipes"]
    assert offered("compare", "a", "--o") == ["--output", "--output-dir"]
    assert offered("nothing", "") == []
    assert offered("status", "--w") == ["--watch"]
    assert "--watch" not in offered("status", "--watch", "--")
    assert offered("results", "x", "--format", "") == ["table", "csv", "json", "parquet"]
    assert offered("results", "x", "--format=p") == ["--format=parquet"]
    assert offered("completion", "") == ["bash", "zsh", "fish"]
    assert offered("doctor", "") == []


def test_every_key_is_offered_and_every_offered_key_exists() -> None:
    top = offered("run", "")
    found = {key for start in top if start.endswith(".") for key in offered("run", start)}
    keys = {key.removesuffix("=") for key in (*found, *top) if key.endswith("=")}
    assert {*point_keys(), *sweep_keys()} <= keys
    assert {"launcher.partition", "logger.mode", "experiment", "penalty", "toy"} <= keys
    for key in sorted(keys):
        for value in offered("run", f"{key}=")[:1]:
            if key != "name":
                try:
                    overrides.load(["toy=small", value] if key != "toy" else [value])
                except (
                    UserError
                ) as error:  # a key that other kinds than these read, or an option that needs another key
                    assert f"{key} is read by" in str(error) or f"{value} needs {key}." in str(error)


def test_values_and_lists_of_values() -> None:
    assert offered("run", "training.l") == ["training.lr=", "training.lr_decay=", "training.lr_warmup="]
    assert set(offered("run", "penalty=")) == {f"penalty={name}" for name in PENALTIES}
    assert offered("run", "penalty=l1,s") == ["penalty=l1,sqrt"]
    assert "penalty=l1,l1" not in offered("run", "penalty=l1,")
    assert set(offered("plan", "sae.init=")) == {f"sae.init={name}" for name in INITS}
    # One value for the whole sweep.
    assert offered("run", "device=cpu,") == []
    # A key is given once.
    assert offered("run", "seed=0", "se") == []
    assert offered("run", "penalty.coefficient=") == []


def test_names_of_what_there_is(here: Path) -> None:
    assert offered("status", "") == offered("report", "") == offered("compare", "") == ["quickstart", "wide"]
    assert offered("status", "quickstart", "") == []
    assert offered("logs", "quickstart", "") == ["a1", "b2"]
    assert offered("run", "name=w") == ["name=wide"]
    assert offered("status", "--output-dir", "out") == ["outputs/"]
    assert offered("status", "--output-dir", "elsewhere", "") == []
    assert offered("run", "output_dir=outputs/p") == ["output_dir=outputs/points/"]
    assert "distribution=./weights.csv" in offered("run", "distribution=./")


def test_the_script_of_a_shell_is_printed() -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "sae-sweep" in call("completion", shell).out
    assert call("completion", "ksh").code == call("complete").code == 2


def test_pressing_tab_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sae_sweep.cli.app import main\nmain()\n"
        "sys.stderr.write(' '.join(sorted({'torch', 'pandas', 'hydra', 'rich', 'yaml'} & set(sys.modules))))"
    )
    command = [sys.executable, "-c", code, "complete", "fish", "run", "penalty=l1,sq"]
    end = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (end.stdout, end.stderr) == ("penalty=l1,sqrt\n", "")


# Key presses


START = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(sae-sweep completion bash)"'),
    "zsh": (["-f", "-i"], 'bindkey -e; unsetopt beep; eval "$(sae-sweep completion zsh)"'),
    "fish": (["--no-config", "-i"], "sae-sweep completion fish | source"),
}


class Prompt:
    """A shell at a terminal, with the completion that its user installed."""

    def __init__(self, shell: str, folder: Path) -> None:
        arguments, install = START[shell]
        (folder / "bin").mkdir()
        program = folder / "bin" / "sae-sweep"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sae_sweep "$@"\n')
        program.chmod(0o755)
        home = {"HOME": str(folder), "ZDOTDIR": str(folder), "XDG_CONFIG_HOME": str(folder), "TERM": "xterm"}
        paths = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment = {**os.environ, **home, **paths}
        self.process = pexpect.spawn(
            shell, arguments, env=environment, cwd=folder, encoding="utf-8", dimensions=(50, 160), timeout=SECONDS
        )
        self.run(install)

    def run(self, line: str) -> None:
        self.process.sendline(f"{line}; echo REA''DY")
        self.process.expect("READY")

    def after(self, keys: str) -> str:
        """The words that these keys leave, as they stand before they are sent."""
        self.process.send(f"{keys}\x01echo G''OT:\x05'<'\r")
        self.process.expect(r"GOT:([^\r\n]*)<")
        return str(self.process.match[1]).rstrip()

    def shown(self, keys: str, last: str) -> str:
        """What the terminal shows after the keys, up to `last`; the line is given up then."""
        self.process.send(keys)
        self.process.expect(re.escape(last))
        text = str(self.process.before) + last
        self.process.send("\x03")
        return text


# An interpreter starts at each press of the tab key.
@pytest.fixture(params=["bash", *(pytest.param(shell, marks=pytest.mark.slow) for shell in ("zsh", "fish"))])
def prompt(request: pytest.FixtureRequest, here: Path) -> Iterator[Prompt]:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    prompt = Prompt(request.param, here)
    yield prompt
    prompt.process.close(force=True)


def test_key_presses(prompt: Prompt) -> None:
    assert prompt.after("sae-sweep stat\t") == "sae-sweep status"
    assert prompt.after("sae-sweep status qui\t--wat\t") == "sae-sweep status quickstart --watch"
    assert prompt.after("sae-sweep run penalty=l1,s\t") == "sae-sweep run penalty=l1,sqrt"
    assert prompt.after("sae-sweep run seed=0 sae.in\twh\t") == "sae-sweep run seed=0 sae.init=whitened"
    assert (
        prompt.after("sae-sweep plan penalty=l1,sqrt training.st\t5")
        == "sae-sweep plan penalty=l1,sqrt training.steps=5"
    )
    assert prompt.after("sae-sweep run 'seed=range(0,3)' devi\tcp\t") == "sae-sweep run seed=range(0,3) device=cpu"
    text = prompt.shown("sae-sweep run penalty=l\t\t", "log1p_sq")
    assert "rror" not in text and "raceback" not in text
