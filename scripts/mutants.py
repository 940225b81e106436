"""Would the tests notice? mutmut changes metrics, classes and claims a line at a time, and runs their tests on each.

    pip install mutmut
    python scripts/mutants.py FOLDER                          # all of it: some hours of one core
    python scripts/mutants.py FOLDER --every 4                # a sample; FOLDER remembers what was tried
    python scripts/mutants.py FOLDER --only labels,classes    # of these files, by the tests that are named like them
    python scripts/mutants.py FOLDER --again                  # what survived, by the tests as they stand now
    python scripts/mutants.py FOLDER --list                   # the score, and every survivor with its change

mutmut leaves decorated functions alone, which would spare the closed forms and everything compiled: in the copy that it
works on, `@decorator` before a function becomes `name = decorator(name)` after it, and numba's is left out.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "sae_sweep/metrics").rglob("*.py"))
TARGETS = [target for target in TARGETS if not target.endswith("__init__.py")]
TARGETS += ["sae_sweep/toys/classes.py", "sae_sweep/reports/claims.py"]
# Tests that are about all metrics, for want of which few changes would be seen in files without tests of their own.
OF_ALL = ["tests/metrics/test_brute_force.py", "tests/metrics/test_numbers.py"]
# Not named like what they test.
NAMED_OTHERWISE = {"sae_sweep/reports/claims.py": "tests/reports/test_verdicts.py"}
# What takes long uncompiled, differs then, or is about other things.
LEFT_OUT = [
    "tests/metrics/test_information.py::test_many_latents_at_random_tell_nothing",
    "tests/metrics/test_brute_force.py::test_a_grid_is_the_union_of_products_each_point_once",
    "tests/metrics/test_brute_force.py::test_ids_differ_exactly_where_canonical_settings_do",
    "tests/metrics/test_numbers.py::test_numbers_of_cells_dealt_anew_stay",
    "tests/metrics/test_probing.py::test_probing_is_asked_for_and_trains_nothing",
    "tests/metrics/test_probing.py::test_priors_and_structure_are_asked_for_too",
    "tests/metrics/test_partition_variance.py::test_variance_of_several_toys_and_sites",
    "tests/metrics/test_theory.py::test_no_sae_costs_less",
]
# mutmut's exit codes of the tests.
SURVIVED, UNTESTED, UNTRIED = (0,), (5, 33), (None, 2)


def tests_of(targets: list[str]) -> list[str]:
    """The files of tests that are named like some targets."""
    named = (f"tests/{Path(target).parts[1]}/test_{Path(target).stem}.py" for target in targets)
    found = [NAMED_OTHERWISE.get(target, name) for target, name in zip(targets, named, strict=True)]
    return [test for test in found if (ROOT / test).exists()]


def copy(folder: Path, targets: list[str], tests: list[str]) -> None:
    """The tracked files as they stand, the targets undecorated, and mutmut's configuration."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "sae_sweep", "conf", "tests"], capture_output=True, text=True
    )
    for name in listed.stdout.split():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_bytes()
        place.write_bytes(undecorated(text.decode()).encode() if name in targets else text)
    left_out = " ".join(f"--deselect {test}" for test in LEFT_OUT)
    (folder / "pyproject.toml").write_text(
        f"[tool.pytest.ini_options]\naddopts = \"-m 'not slow' -p no:cacheprovider {left_out}\"\nmarkers = ['slow']\n"
        f"[tool.mutmut]\nsource_paths = ['sae_sweep']\nonly_mutate = {targets}\nalso_copy = ['conf']\n"
        f"pytest_add_cli_args_test_selection = {tests}\nprocess_isolation = 'forkserver'\n"
        "use_git_change_detection = false\ntimeout_constant = 10.0\n"
    )


def undecorated(text: str) -> str:
    """The module with `@decorator` moved behind each decorated function, as a call; numba's is dropped."""
    lines = text.splitlines()
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.decorator_list]
    for node in sorted(found, key=lambda node: -node.lineno):
        indent = " " * node.col_offset
        for decorator in node.decorator_list:
            call = ast.unparse(decorator)
            if "jit" not in call:
                lines.insert(node.end_lineno or node.lineno, f"{indent}{node.name} = {call}({node.name})")
        first = min(decorator.lineno for decorator in node.decorator_list)
        del lines[first - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def mutmut(folder: Path, *names: str) -> None:
    """Try these mutants."""
    # The copy alone, not the checkout.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (folder / "mutmut.log").open("w") as log:
        command = ["mutmut", "run", "--max-children", "1", *names]
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log)


def tried(folder: Path) -> dict[str, dict[str, int | None]]:
    """Of each target, how the tests ended for each mutant; None before they ran."""
    metas = {target: folder / "mutants" / f"{target}.meta" for target in TARGETS}
    return {
        target: json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}
        for target, meta in metas.items()
    }


def report(folder: Path) -> None:
    """The score by file, and each survivor as a diff."""
    total: Counter[str] = Counter()
    alive = []
    print("| file | mutants | killed | survived |\n|---|---|---|---|")
    for target, codes in tried(folder).items():
        counts = Counter(
            "untried" if code in UNTRIED else "survived" if code in (*SURVIVED, *UNTESTED) else "killed"
            for code in codes.values()
        )
        total.update(counts)
        alive += [key for key, code in codes.items() if code in (*SURVIVED, *UNTESTED)]
        both = counts["killed"] + counts["survived"]
        print(f"| `{target}` | {both} of {len(codes)} | {counts['killed']} | {counts['survived']} |")
    both = total["killed"] + total["survived"]
    share = total["killed"] / max(both, 1)
    print(f"| all | {both} | {total['killed']} ({share:.1%}) | {total['survived']} |")
    if total["untried"]:
        print(f"\n{total['untried']} not tried yet.")
    for key in alive:
        shown = subprocess.run(["mutmut", "show", key], cwd=folder, capture_output=True, text=True).stdout
        changed = [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("---", "+++")]
        print("\n" + "\n".join([key, *changed]))


def main() -> None:
    """Copy, mutate, test, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, metavar="K", help="every Kth mutant of each file alone")
    parser.add_argument("--only", metavar="A,B", help="files alone, by their names without .py")
    parser.add_argument("--again", action="store_true", help="try again what survived")
    parser.add_argument("--list", action="store_true", help="report what was tried, and try nothing")
    words = parser.parse_args()
    if not words.list:
        only = words.only.split(",") if words.only else None
        targets = [target for target in TARGETS if only is None or Path(target).stem in only]
        copy(words.folder, targets, tests_of(targets) + (OF_ALL if only is None else []))
        if not any((words.folder / "mutants").glob("**/*.meta")):
            mutmut(words.folder, "none of them")  # makes them, and notes which tests run which function
        wanting = (*SURVIVED, *UNTESTED) if words.again else UNTRIED
        wanted = [
            key
            for codes in tried(words.folder).values()
            for key in sorted(codes)[:: words.every]
            if codes[key] in wanting
        ]
        if wanted:
            mutmut(words.folder, *wanted)
    report(words.folder)


if __name__ == "__main__":
    sys.exit(main())
