"""What a process needs of its machine and may lack: a home, a name, UTF-8, a folder for compiled code.

Containers and clusters have users without an entry in passwd, homes and packages that nobody may write, and locales of
before Unicode. `prepare` makes up for that before anything is imported that would trip over it.
"""

from __future__ import annotations

import atexit
import codecs
import locale
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sae_sweep.errors import EnvironmentProblem

PACKAGE = Path(__file__).parent
# Folders of the package whose functions numba compiles.
_COMPILED = ("metrics", "kernels/cpu")


def prepare() -> None:
    """Start again in UTF-8 where the locale is of another encoding; give a process without a home or name one."""
    if not utf8() and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if not home():
        # Else libraries would make a folder named `~` in the current one.
        os.environ["HOME"] = _temporary("sae-sweep-home-")
    if not user():
        os.environ["LOGNAME"] = str(os.getuid())


def utf8() -> bool:
    """Whether text that names no encoding is UTF-8."""
    return bool(sys.flags.utf8_mode) or codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8"


def home() -> Path | None:
    """The user's home, whether it can be written or not."""
    with suppress(RuntimeError):
        return Path.home()
    return None


def user() -> str | None:
    """The user's name."""
    import getpass

    with suppress(KeyError, OSError, ImportError):
        return getpass.getuser()
    return None


def check_current_folder() -> None:
    """EnvironmentProblem where the folder that the process stands in is gone."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise EnvironmentProblem("the current folder was deleted: change to another one, and try again") from None


def dangling(path: Path) -> Path | None:
    """The link in a path that leads nowhere."""
    return next((each for each in (path, *path.parents) if each.is_symlink() and not each.exists()), None)


def use_numba_cache() -> None:
    """Have numba keep compiled code where it may: beside the package, as it does of its own accord, else elsewhere.

    To be called before the first function is compiled. What is unusual is said, once for a folder that lasts.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or (place := numba_cache()) == PACKAGE:
        return
    why = f"since {PACKAGE} cannot be written"
    if place is None:
        os.environ["NUMBA_CACHE_DIR"] = _temporary("sae-sweep-numba-")
        _say(f"compiled code is not kept, {why}, nor another folder for it: set NUMBA_CACHE_DIR to one that can be")
        return
    os.environ["NUMBA_CACHE_DIR"] = str(place)
    if not any(place.iterdir()):
        _say(f"compiled code is kept in {place}, {why}")


def numba_cache() -> Path | None:
    """The folder of compiled code: the package, or else the first folder that can be ours alone; None if none can."""
    if all(_writable(PACKAGE / folder) for folder in _COMPILED):
        return PACKAGE
    return next((folder for folder in _private_folders() if _ours(folder)), None)


def _private_folders() -> Iterator[Path]:
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache or home():
        yield Path(cache or home() / ".cache") / "sae-sweep" / "numba"  # type: ignore[operator]
    yield Path(tempfile.gettempdir()) / f"sae-sweep-{os.getuid()}-numba"


def _writable(folder: Path) -> bool:
    compiled = folder / "__pycache__"
    return os.access(compiled if compiled.exists() else folder, os.W_OK)


def _ours(folder: Path) -> bool:
    """Whether a folder is there, or can be made, that nobody else can write: numba unpickles what lies in it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _temporary(prefix: str) -> str:
    """A folder that ends with the process."""
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _say(line: str) -> None:
    with suppress(OSError):
        print(f"note: {line}", file=sys.stderr, flush=True)
