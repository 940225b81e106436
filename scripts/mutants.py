"""Would the tests notice? mutmut changes the metrics and the classes a line at a time, and runs their tests on each.

    pip install mutmut
    python scripts/mutants.py FOLDER                          # all of it: some hours of one core
    python scripts/mutants.py FOLDER --every 4                # a sample; FOLDER remembers what was tried
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
TARGETS = [target for target in TARGETS if not target.endswith("__init__.py")] + ["sae_sweep/toys/classes.py"]
# The tests named like what they test, but for what takes long uncompiled, differs then, or is about other things.
TESTS = [f"tests/{Path(target).parts[1]}/test_{Path(target).stem}.py" for target in TARGETS]
TESTS += ["tests/metrics/test_brute_force.py", "tests/metrics/test_numbers.py"]
TESTS = [test for test in TESTS if (ROOT / test).exists()]
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
FIRST = "sae_sweep.toys.classes.x_count_cells__mutmut_1"
# mutmut's exit codes of the tests.
SURVIVED, UNTESTED, UNTRIED = (0,), (5, 33), (None, 2)


def copy(folder: Path) -> None:
    """The tracked files as they stand, the targets undecorated, and mutmut's configuration."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "sae_sweep", "conf", "tests"], capture_output=True, text=True
    )
    for name in listed.stdout.split():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_bytes()
        place.write_bytes(undecorated(text.decode()).encode() if name in TARGETS else text)
    left_out = " ".join(f"--deselect {test}" for test in LEFT_OUT)
    (folder / "pyproject.toml").write_text(
        f"[tool.pytest.ini_options]\naddopts = \"-m 'not slow' -p no:cacheprovider {left_out}\"\nmarkers = ['slow']\n"
        f"[tool.mutmut]\nsource_paths = ['sae_sweep']\nonly_mutate = {TARGETS}\nalso_copy = ['conf']\n"
        f"pytest_add_cli_args_test_selection = {TESTS}\nprocess_isolation = 'forkserver'\n"
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
    parser.add_argument("--again", action="store_true", help="try again what survived")
    parser.add_argument("--list", action="store_true", help="report what was tried, and try nothing")
    words = parser.parse_args()
    if not words.list:
        copy(words.folder)
        if not any((words.folder / "mutants").glob("**/*.meta")):
            mutmut(words.folder, FIRST)  # makes all of them
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
