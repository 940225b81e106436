"""The table of docs/trust.md in small: a few trials of every fault."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# How the rows of the table begin; "W&B" stands for several kinds of letting down.
FAULTS = ["SIGKILL", "SIGTERM", "SIGINT", "SIGUSR2", "training until a plateau, SIGKILL"]
FAULTS += ["training until a plateau, SIGTERM", "two processes", "eight processes", "disk full", "store read-only"]
FAULTS += ["store deleted", "damaged file", "NaN or infinity", "out of memory, pretended", "out of memory, real"]
FAULTS += ["hostile", "store of an earlier version", "store of a later version", "W&B"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_few_trials_of_every_fault(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "scripts" / "torture.py", "--quick", "--json", tmp_path / "rows.json"]
    end = subprocess.run(words, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(FAULTS)
    for row, begins in zip(rows, FAULTS, strict=True):
        assert row["fault"].startswith(begins)
        assert row["failures"] == 0
        # Without root no disk can be mounted, and the table says so.
        assert row["trials"] > 0 or "mount" in row["not_run"]
        assert f"| {row['fault']} |" in end.stdout


def test_the_page_holds_the_table_that_the_script_made() -> None:
    page = (ROOT / "docs" / "trust.md").read_text()
    table = page.partition("<!-- made by scripts/torture.py -->")[2].partition("<!-- until here -->")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \|[^|]+\| (\d+) \| \d+ \|$", table, re.MULTILINE))
    for begins in FAULTS:
        (name,) = [name for name in rows if name.startswith(begins)]
        assert int(rows[name]) > 0
    assert "cores" in table
