"""Machines that lack what is usual: a home, a name, UTF-8, a package that can be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import call, fresh

from sae_sweep import environment


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package that cannot be written, and a home and a temporary folder of its own."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(environment, "_writable", lambda folder: False)
    monkeypatch.setattr(environment.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    return tmp_path


def test_compiled_code_is_kept_elsewhere_and_that_is_said_once(
    read_only: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.use_numba_cache()
    place = read_only / "home/.cache/sae-sweep/numba"
    assert os.environ["NUMBA_CACHE_DIR"] == str(place)
    assert place.stat().st_mode & 0o077 == 0
    assert capsys.readouterr().err.startswith(f"note: compiled code is kept in {place}")
    (place / "something").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    environment.use_numba_cache()
    assert capsys.readouterr().err == ""


def test_without_a_home_the_temporary_folder_is_taken_if_nobody_else_can_write_it(
    read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (read_only / "file").touch()
    monkeypatch.setenv("HOME", str(read_only / "file"))
    place = environment.numba_cache()
    assert place == read_only / f"tmp/sae-sweep-{os.getuid()}-numba"
    place.chmod(0o777)
    assert environment.numba_cache() is None


def test_where_nothing_can_be_written_code_is_not_kept(
    read_only: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "_ours", lambda folder: False)
    environment.use_numba_cache()
    assert Path(os.environ["NUMBA_CACHE_DIR"]).is_dir()
    assert "compiled code is not kept" in capsys.readouterr().err


def test_a_process_without_home_and_name_gets_both_and_no_stray_folder(tmp_path: Path) -> None:
    code = (
        "import os, pwd\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "from sae_sweep import environment\n"
        "environment.prepare()\n"
        "import getpass\n"
        "print(os.path.isabs(os.path.expanduser('~')), getpass.getuser() == str(os.getuid()))"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "LOGNAME", "USER", "USERNAME")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "LNAME": ""}
    end = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert end.stdout == "True True\n", end.stderr
    assert not list(tmp_path.iterdir())


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    end = fresh("penalties", "l1", cwd=tmp_path, env=env)
    assert end.code == 0 and "Σ" in end.out


def test_links_to_nothing_and_deleted_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    end = call("run", f"output_dir={tmp_path}/link/outputs")
    assert end.code == 2 and f"{tmp_path}/link is a link to nothing" in end.err
    end = call("status", "--output-dir", str(tmp_path / "link"))
    assert end.code == 2 and f"{tmp_path}/link is a link to nothing" in end.err
    folder = tmp_path / "deleted"
    folder.mkdir()
    before = Path.cwd()
    try:
        os.chdir(folder)
        folder.rmdir()
        end = call("plan")
    finally:
        os.chdir(before)
    assert end.code == 4 and "the current folder was deleted" in end.err
