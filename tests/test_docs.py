"""The documentation: links lead somewhere, commands are understood, and what is generated is up to date."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from commandline import call, fresh

import sae_sweep
from sae_sweep.cli.app import app
from sae_sweep.config import overrides
from sae_sweep.config.columns import table_columns

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXTS = {page: page.read_text() for page in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# A file that a block of shell writes.
HERE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END$", re.DOTALL | re.MULTILINE)
# What a reader puts a name of their own in the place of.
PLACEHOLDER = re.compile(r"\b(NAME|SWEEP|POINT|PATH|FILE|FOLDER|ID|TWO|ONE)\b|…|\.\.\.")


def blocks(*languages: str) -> Iterator[tuple[Path, str]]:
    """The code blocks of all pages in one of some languages."""
    for page, text in TEXTS.items():
        yield from ((page, body) for language, body in BLOCK.findall(text) if language in languages)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", TEXTS[page]), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", TEXTS[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target} is no heading of {place.name}"


def commands() -> list[str]:
    """Every command of ours that stands in a block of shell of a page written by hand, once."""
    lines: dict[str, None] = {}
    for page, body in blocks("bash", "sh", "console"):
        # The examples of --help are tried by the tests of the command line; test_activations_page.py runs its page.
        if "reference" in page.parts or page.name == "activations.md":
            continue
        for line in body.replace("\\\n", " ").splitlines():
            for part in re.split(r" && |; | \|\| ", re.sub(r"\s#.*", "", line.removeprefix("$ ").strip())):
                if part.startswith("sae-sweep ") and not PLACEHOLDER.search(part):
                    lines[part.partition(" >")[0].rstrip("&").strip()] = None
    return [*lines]


@pytest.mark.slow
def test_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed and, where it takes overrides, its grid is made; in a folder that `init` wrote, with the
    tutorial's experiment."""
    monkeypatch.chdir(tmp_path)
    assert call("init", ".").code == 0
    (tmp_path / "conf/experiment/mine.yaml").write_text((ROOT / "docs/examples/mine.yaml").read_text())
    (tmp_path / "other.yaml").write_text("seed: 1\n")
    for text in TEXTS.values():
        for name, body in HERE.findall(text):
            (tmp_path / name).write_text(body)
    program = typer.main.get_command(app)
    found = commands()
    assert len(found) > 40
    for line in found:
        name, *words = shlex.split(line)[1:]
        assert name in program.commands, line
        words = [word for word in words if not re.fullmatch(r"\[.*\]", word)]
        try:
            given = program.commands[name].make_context(name, words).params
            if given.get("overrides"):
                first = ["launcher=slurm"] if name == "submit" else []
                overrides.load(given["overrides"], first, yes=True)
        except Exception as error:
            pytest.fail(f"{line}: {error}")


def test_the_readme_gives_the_two_commands_on_a_line_each() -> None:
    """They are what a newcomer pastes, and CI extracts the second from the page and runs it."""
    lines = [
        line.split("#")[0].strip()
        for page, body in blocks("bash")
        if page.name == "README.md"
        for line in body.splitlines()
    ]
    assert lines.count("pip install -e . && sae-sweep run") == 1
    assert [line for line in lines if "pytest" in line] == ['pip install -e ".[test]" && pytest']


def test_python_is_python() -> None:
    names = set()
    for page, body in blocks("python"):
        if "reference" not in page.parts:
            tree = ast.parse(body, str(page))
            imports = (
                each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and each.module == "sae_sweep"
            )
            names |= {alias.name for each in imports for alias in each.names}
            names |= set(re.findall(r"\bsae_sweep\.(\w+)\(", body))
    assert names and names <= set(sae_sweep.__all__)


def test_the_tutorials_experiment_is_the_example() -> None:
    (text,) = (body for page, body in blocks("yaml") if page.name == "tutorial.md")
    assert yaml.safe_load(text) == yaml.safe_load((ROOT / "docs/examples/mine.yaml").read_text())


def test_every_column_is_in_the_reference() -> None:
    text = (ROOT / "docs/reference/columns.md").read_text()
    assert [name for name in table_columns() if not name.startswith("shuffled_") and f"`{name}`" not in text] == []


def script() -> ModuleType:
    """scripts/docs.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_script", ROOT / "scripts/docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_program_says_of_itself() -> None:
    for path, text in script().pages().items():
        assert (ROOT / "docs" / path).read_text() == text, f"docs/{path}: run python scripts/docs.py"


def test_what_stands_for_the_same_version_is_the_same() -> None:
    version = sae_sweep.__version__
    cited: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version and f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_is_run_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text((ROOT / "docs/examples/mine.yaml").read_text())
    text = (ROOT / "docs/tutorial.md").read_text()
    ran = []
    for language, body in BLOCK.findall(text):
        for line in body.splitlines() if language == "bash" else ():
            if line.startswith("sae-sweep "):
                end = fresh(*shlex.split(line)[1:], cwd=tmp_path)
                assert end.code == 0, f"{line}: {end.err}"
                ran.append(line)
    assert len(ran) >= 8
    (code,) = (body for language, body in BLOCK.findall(text) if language == "python")
    assert "splits_per_max" in fresh_python(code, tmp_path)


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    few = ["training.steps=50", "penalty.coefficient=0.1", "toy.steps=50"]
    assert "saturating" in fresh_python((ROOT / "docs/examples/penalty.py").read_text(), tmp_path, *few)


def fresh_python(code: str, cwd: Path, *words: str) -> str:
    """What a program prints, run in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (cwd / "program.py").write_text(code)
    command = [sys.executable, "program.py", *words]
    return subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout
