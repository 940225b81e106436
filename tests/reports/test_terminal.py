"""The report and the live view: what they say, on any width and any stream."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pty
import re
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyte
import pytest
import yaml
from fabricated import SMALL, point, record, sweep

from sae_sweep.config.settings import Penalty, Point, Toy, Training
from sae_sweep.reports import layout, terminal
from sae_sweep.reports.claims import Verdict
from sae_sweep.reports.live import LiveView, clock, describe
from sae_sweep.reports.material import Finished, Material
from sae_sweep.reports.results_table import penalty_name, representatives
from sae_sweep.store.results import load, tables, write
from sae_sweep.store.store import Store
from sae_sweep.sweep.events import Logging, Note, PointDone, PointFailed, ToyProgress, TrainProgress

INFO = {"name": "quick", "points": 20}
MAGNITUDES = ("constant", "exponential")
START = {"fvu": 0.4321, "l0": 7.5, "owned_maxes": 14, "label_mq": 22, "info_query": 0.4}


def results() -> list[tuple[Point, dict[str, Any]]]:
    """Two widths, three starts, two penalties and TopK, two coefficients, two seeds."""
    found = []
    for seed in (0, 1):
        for width, init in ((16, "kmeans"), (136, "whitened"), (136, "oracle")):
            for c in (0.5, 2.0):
                for name in ("l1", "tanh", "topk"):
                    counted: dict[str, Any] = {"architecture": "topk", "k": int(2 * c)}
                    sparsity = counted if name == "topk" else {"penalty": Penalty(name, c)}
                    metrics = {
                        "fvu": 0.01 * c + 0.002 * seed,
                        "l0": 3 / c,
                        "loss": c + (init != "oracle"),
                        "owned_maxes": 16,
                        "label_m": 16 if width == 16 else 3,
                        "label_mq": 0 if width == 16 else 61,
                        "label_mn": 0 if width == 16 else 4,
                        "splits_per_max": 0 if width == 16 else 65 / 16,
                        "distinct_splits_per_max": 0 if width == 16 else 3.5,
                        "info_query": 0.8,
                    }
                    found.append((point(width=width, init=init, partition="mq", seed=seed, **sparsity), metrics))
    return found


def planted(root: Path, found: list[tuple[Point, dict[str, Any]]]) -> Store:
    store = sweep(root, [])
    for at, metrics in found:
        store.commit("points", at.id, record(at, metrics, START), {})
    store.write_sweep_file("quick", "points.txt", "".join(f"{at.id}\n" for at, _ in found).encode())
    return store


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return planted(tmp_path_factory.mktemp("quick"), results())


def rendered(store: Store, width: int = 80, encoding: str = "utf-8", **more: Any) -> str:
    raw = io.BytesIO()
    console = layout.console(io.TextIOWrapper(raw, encoding=encoding))
    console.width = width
    verdicts = more.pop("verdicts", [])
    material = Material(INFO, Finished(*tables(store, "quick")), verdicts, more.pop("failures", {}))
    show = more.pop("show", terminal.show_all)
    show(console, material, store.sweep("quick"))
    return raw.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def shown(quick: Store) -> Callable[[int], str]:
    """The report of that store on a terminal of some width, each made once."""
    return functools.cache(lambda width: rendered(quick, width))


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_report_fits_the_terminal_and_has_no_escape_codes(shown: Callable[[int], str], width: int) -> None:
    text = shown(width)
    assert "\x1b" not in text
    lines = text.split("Where it lies")[0].splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert "\nsae-sweep report quick --output-dir " in text
    for part in ("quick  36 of 20 points", "width 16 · init kmeans", "width 136 · init oracle, one latent per mq"):
        assert part in text
    assert text.count("untrained") >= 5


def test_a_row_is_the_mean_over_seeds_at_the_middle_of_the_ladder(shown: Callable[[int], str]) -> None:
    text = shown(80)
    table = text.split("width 136 · init whitened")[1].split("width 136 · init oracle")[0].splitlines()
    rows = {line.split()[0]: line.split() for line in table if line.strip()}
    # FVU × max(L0, 1): .011 × 6 at c = 0.5, .021 × 1.5 at c = 2
    assert rows["l1"][:10] == ["l1", "2", "1.50", ".0210", "16", "4.06", "3.50", "0.00", "0", "+1.000"]
    assert " ".join(rows["tanh"][10:]).startswith("61 mq, 4 mn")
    assert rows["topk"][1] == "k=4"
    assert rows["untrained"][:5] == ["untrained", "–", "7.50", ".4321", "14"]
    assert rows["untrained"][-2:] == ["22", "mq"]
    assert "means over 2 SAEs" in " ".join(text.split())


def test_wide_terminals_show_each_label_and_the_spread(shown: Callable[[int], str]) -> None:
    text = shown(200)
    assert ".0210 ±.0014" in text
    head = next(line for line in text.splitlines() if line.startswith("penalty"))
    assert head.split()[-3:] == ["m", "mq", "mn"]


def test_what_follows_from_the_kind_of_toy_is_not_told_beside_it(tmp_path: Path) -> None:
    toys = [SMALL, *(Toy(name="parents", features=4, interaction=share) for share in (0.0, 1.0))]
    store = sweep(tmp_path, [(point(toy=toy), {"fvu": 0.1, "l0": 1.0}) for toy in toys])
    varied = ["toy.name", "toy.d_vocab", "toy.k", "toy.features", "toy.interaction", "site.name"]
    store.write_sweep_file("quick", "sweep.yaml", yaml.safe_dump({**store.info("quick"), "varied": varied}).encode())
    text = rendered(store, 200)
    assert text.startswith("quick  3 of 20 points finished · toy right on 100%\n")
    titles = [line for line in text.splitlines() if line.startswith("width 64 · init kmeans · ")]
    shares = ["max_of_k-16-3", *(f"parents-4-32 · interaction={x}" for x in (0, 1))]
    assert titles[:3] == [f"width 64 · init kmeans · {share}" for share in shares]


def test_what_a_penalty_reads_tells_rows_apart(tmp_path: Path) -> None:
    penalties = [Penalty("lp", 1.0, p=0.3), Penalty("lp", 1.0, p=0.7), Penalty("log1p", 1.0, scale=2.0)]
    store = planted(tmp_path, [(point(penalty=penalty), {"fvu": 0.1, "l0": 2.0}) for penalty in penalties])
    frame = load(store, "quick")
    assert len(representatives(frame)) == 3
    assert [penalty_name(row) for _, row in frame.iterrows()] == [
        "lp p=0.3",
        "lp p=0.7",
        "log1p s=2",
    ]


def test_the_charts_show_every_penalty_and_the_same_axes(shown: Callable[[int], str]) -> None:
    text = shown(100)
    front = text.split("The front")[1].split("Which factor")[0]
    assert "o l1   x tanh   + topk" in front
    first, second = front.split("FVU against L0")[1:]
    assert [line.split()[0] for line in first.splitlines() if "┤" in line] == [
        line.split()[0] for line in second.splitlines() if "┤" in line
    ]
    assert "+" in first  # l1, tanh and topk lie on one another; the last is seen
    assert re.search(r"^ +2 +3 +4 +5 +6$", first, re.MULTILINE)


def test_a_single_setting_is_no_front(tmp_path: Path) -> None:
    """The chart shows the widest width that has a ladder; where none has, there is neither chart nor comparison."""
    one = [(point(width=136, penalty=Penalty(name, 1.0)), {"fvu": 0.1, "l0": 2.0}) for name in ("l1", "tanh")]
    ladder = [(point(width=16, penalty=Penalty("l1", c)), {"fvu": 0.1 * c, "l0": 2.0 / c}) for c in (0.5, 2.0)]
    text = rendered(planted(tmp_path / "both", one + ladder))
    assert "FVU against L0 · width 16" in text and "FVU against L0 · width 136" not in text
    text = rendered(planted(tmp_path / "one", one))
    assert "The front" not in text and "Fronts compared" not in text and "tanh" in text


def test_long_names_leave_room_for_the_numbers(tmp_path: Path) -> None:
    toys = [
        Toy(name="parents", features=4, interaction=share, magnitudes=m) for share in (0.0, 0.5) for m in MAGNITUDES
    ]
    found = [(point(toy=toy), {"fvu": 0.1, "l0": 2.0, "label_mq": 60, "label_m": 3}) for toy in toys]
    store = planted(tmp_path, found)
    varied = ["toy.interaction", "toy.magnitudes"]
    store.write_sweep_file("quick", "sweep.yaml", yaml.safe_dump({**store.info("quick"), "varied": varied}).encode())
    text = rendered(store)
    table = text.split("Which factor")[1].split("Named:")[0]
    assert "interaction=0.5" in table and len(re.findall(r"^trained .* 60 ", table, re.MULTILINE)) == 4
    assert all(len(line) <= 80 for line in text.split("Where it lies")[0].splitlines())


def test_the_factor_that_latents_split_by_is_named(shown: Callable[[int], str], tmp_path: Path) -> None:
    text = shown(120)
    sentence = "Init whitened: latents split by the query most, 61 of them against 4 by the runner-up; 3 stand for"
    assert sentence in text
    whitened = next(line for line in text.splitlines() if re.match(r"whitened +█", line))
    assert whitened.split()[-3:] == ["80%", "0%", "0%"]
    unsplit = rendered(planted(tmp_path, [(at, m) for at, m in results() if at.sae.width == 16]), 120)
    assert "Init kmeans: latents do not split; 16 stand for a whole max." in unsplit


def test_what_a_sweep_varies_beside_width_and_start_titles_its_sections(tmp_path: Path) -> None:
    found = [
        (point(width=width, site=site, training=Training(steps=steps)), {"fvu": 0.1, "l0": 2.0, "label_mq": 5})
        for site in ("pre_unembed", "post_unembed")
        for width, steps in ((16, 100), (136, 200))
    ]
    text = rendered(planted(tmp_path / "sites", found), 120)
    assert "width 136 · init kmeans · post_unembed\n" in text  # the steps follow from the width
    assert "Init kmeans, pre_unembed: latents split by the query most" in text
    found.append((point(width=136, training=Training(steps=300)), {"fvu": 0.1, "l0": 2.0}))
    text = rendered(planted(tmp_path / "steps", found), 120)
    assert "width 136 · init kmeans · pre_unembed · steps=300\n" in text


def test_claims_failures_and_where_it_lies(quick: Store) -> None:
    verdicts = [
        Verdict(name, name, 1.0, 1.0, 1.0, 1, 1, None, None, f"Claim {name}.")
        for name in ("supported", "not supported", "undecided")
    ]
    failures = {f"f{i}": {"reason": f"reason {i}"} for i in range(7)}
    text = rendered(quick, 80, verdicts=verdicts, failures=failures)
    for line in ("✓ Claim supported.", "✗ Claim not supported.", "? Claim undecided.", "7 failed", "… and 2 more"):
        assert line in text
    write(quick, "quick")
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(text[text.index("  from sae_sweep import") :]), scope)
    assert len(scope["df"]) == 36


def test_the_short_report_is_verdicts_and_ten_rows_in_fifty_lines(quick: Store) -> None:
    long = "A claim that takes some words to make, and some more to say what was found of it; " * 4
    verdicts = [
        Verdict(name, "supported", 1.0, 1.0, 1.0, 1, 1, None, None, f"{name}: {long}") for name in map(str, range(60))
    ]
    failures = {f"f{i}": {"reason": "reason " * 30} for i in range(7)}
    for width, some in ((80, verdicts), (80, verdicts[:2]), (200, [])):
        text = rendered(quick, width, show=terminal.show, verdicts=some, failures=failures)
        assert len(text.splitlines()) <= 50
        assert "Where it lies" in text and "--full" in text
        rows = [line for line in text.splitlines() if re.match(r"(16|136) (kmeans|whitened|oracle)", line)]
        # Three penalties of two widths and three inits: each init with its best.
        assert len(rows) == 9 and rows[0].startswith("16 kmeans")
        assert len([line for line in text.splitlines() if line.startswith("✓")]) >= min(2, len(some))
    assert "of each width and init in turn" not in text


def test_nothing_finished_and_nothing_measured(tmp_path: Path) -> None:
    assert "0 of 20 points finished" in rendered(planted(tmp_path / "none", []))
    nulls = dict.fromkeys(results()[0][1], None)
    assert "–" in rendered(planted(tmp_path / "nulls", [(point(), nulls), (point(seed=1), nulls)]))


def test_a_stream_without_unicode_gets_ascii(quick: Store) -> None:
    text = rendered(quick, 80, encoding="ascii")
    assert "width 136 . init oracle" in text and "####" in text and "?" not in text.split("Which factor")[0]


def on_terminal(monkeypatch: pytest.MonkeyPatch, no_color: bool, show, width: int = 100) -> str:
    """What `show(stream)` writes to a terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    ours, theirs = pty.openpty()
    written: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how a terminal ends
            while chunk := os.read(ours, 65536):
                written.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        show(stream)
    reader.join(30)
    os.close(ours)
    return b"".join(written).decode()


@pytest.mark.parametrize("no_color", [True, False])
def test_colour_on_a_terminal_unless_told_not_to(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    def show(stream) -> None:
        layout.write(layout.console(stream), terminal._heading("Results"))

    assert ("\x1b[" in on_terminal(monkeypatch, no_color, show)) is not no_color


def run_live(stream, steps: int = 2) -> LiveView:
    with LiveView(total=6, finished=2, estimate_seconds=40, stream=stream) as view:
        view.handle(ToyProgress(SMALL, 1500, 1500, 0.01))
        view.handle(TrainProgress(1, 1, 4, 50, 100, 0.02, 2.3))
        for seed in range(steps):
            at = point(width=136, penalty=Penalty("l1", 0.5), seed=seed)
            view.handle(PointDone(at, {"metrics": {"fvu": 0.012, "l0": 2.3, "splits_per_max": None}}))
        view.handle(PointFailed(point(seed=9), 300, "the loss became NaN"))
        view.handle(Note("a damaged file is being recomputed"))
    return view


def test_piped_there_is_one_line_per_point() -> None:
    stream = io.StringIO()
    run_live(stream)
    first, second = (point(width=136, penalty=Penalty("l1", 0.5), seed=seed).id[:8] for seed in (0, 1))
    assert stream.getvalue().splitlines() == [
        "toy max_of_k-16-3 seed 0 trained, loss 0.0100",
        f"[3/6] done {first} width=136 kmeans l1 c=0.5 seed=0 fvu=.0120 l0=2.30",
        f"[4/6] done {second} width=136 kmeans l1 c=0.5 seed=1 fvu=.0120 l0=2.30",
        f"[5/6] FAILED {point(seed=9).id[:8]} width=64 kmeans l1 c=1 seed=9 at step 300: the loss became NaN",
        "a damaged file is being recomputed",
    ]


@pytest.mark.parametrize("no_color", [True, False])
def test_on_a_terminal_the_view_is_drawn_and_failures_stay(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    text = on_terminal(monkeypatch, no_color, run_live)
    coloured = re.search(r"\x1b\[[\d;]*m", text)
    assert (coloured is None) is no_color
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    assert "pack 1 of 1" in plain and "5/6, 1 failed" in plain and "left" in plain
    assert "the loss became NaN" in plain and "a damaged file" in plain


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_view_of_a_thousand_points_is_calm(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """A few lines whatever happens, none wider than the terminal; failures stay, but not hundreds of them."""

    def show(stream) -> None:
        with LiveView(total=1000, finished=0, estimate_seconds=40, stream=stream) as view:
            view.handle(TrainProgress(1, 8, 1000, 50, 100, 0.02, 2.3))
            for seed in range(600):
                at = point(width=136, init="whitened", penalty=Penalty("log1p", 0.25, scale=2.0), seed=seed)
                view.handle(PointDone(at, {"metrics": {"fvu": 0.012, "l0": 2.3, "splits_per_max": 7.25}}))
            for seed in range(300):
                view.handle(PointFailed(point(seed=seed), 300, "the loss became NaN"))
            view._live.refresh()

    raw = on_terminal(monkeypatch, True, show, width)
    screen = pyte.HistoryScreen(width, 24, history=10_000)
    # As it stood before the view was taken away: the last drawing ends with the line of points.
    end = raw.rindex("900/1,000")
    pyte.Stream(screen).feed(raw[: raw.index("left", end) + 4])
    lines = [line.rstrip() for line in screen.display if line.strip()]
    # A failure's reason may need a second line.
    assert len(screen.history.top) == 0 and len(lines) <= 2 * 5 + 1 + 4 + 2
    assert sum("FAILED" in line for line in lines) == 5
    done = [line for line in lines if "whitened log1p" in line]
    assert len(done) == 4 and all(line.endswith("FVU .0120  L0   2.30  splits  7.25") for line in done)
    assert lines[-1].endswith("left") and "300 failed" in lines[-1]


def test_a_pipe_gets_lines_even_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    run_live(stream)
    assert "\x1b" not in stream.getvalue() and len(stream.getvalue().splitlines()) == 5


def test_waiting_for_wandb_is_said_once_in_a_pipe_and_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(stream) -> None:
        with LiveView(total=3, finished=0, estimate_seconds=40, stream=stream) as view:
            for done in (1, 2, 3):
                view.handle(Logging(done, 4))

    piped = io.StringIO()
    show(piped)
    assert piped.getvalue() == "logging to W&B: 3 of 4 runs left\n"
    assert "3/4 runs logged" in on_terminal(monkeypatch, True, show, 80)


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


def test_a_view_that_cannot_be_written_never_ends_the_run() -> None:
    view = run_live(Broken())
    view.handle(object())  # type: ignore[arg-type]


def test_time_left_goes_from_the_estimate_to_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("sae_sweep.reports.live.time.monotonic", lambda: now[0])
    view = LiveView(total=10, finished=0, estimate_seconds=50, stream=io.StringIO())
    assert view.seconds_left() == 50
    now[0] += 10
    view.handle(TrainProgress(1, 2, 5, 20, 100, 0.1, 1.0))  # a tenth of the work: half trusted
    assert view.seconds_left() == pytest.approx(0.9 * (0.5 * 50 + 0.5 * 100))
    view.handle(TrainProgress(1, 2, 5, 100, 100, 0.1, 1.0))
    for seed in range(5):
        view.handle(PointDone(point(seed=seed), {}))
    assert view.seconds_left() == pytest.approx(10)  # half the work took 10 s
    assert LiveView(3, 3, 0.0, io.StringIO()).seconds_left() == 0
    assert [clock(s) for s in (0, 61.4, 3723)] == ["0:00", "1:01", "1:02:03"]


def test_points_in_a_few_words() -> None:
    assert describe(point(width=8, init="oracle", partition="mq", penalty=Penalty("tanh", 0.5, scale=2.0))) == (
        "width=8 oracle mq tanh c=0.5 scale=2 seed=0"
    )
    assert describe(point(architecture="topk", k=3)) == "width=64 kmeans topk k=3 seed=0"


def test_a_row_says_which_recipe_it_is_the_best_of(tmp_path: Path) -> None:
    """The best of a width, init and penalty may be the one whose dead latents were revived: its row says so."""
    recipes = (Training(), Training(revival="resample"))
    some = [(point(width=136, training=each), {"fvu": 0.1 / (i + 1), "l0": 1.0}) for i, each in enumerate(recipes)]
    frame = load(sweep(tmp_path / "both", some, varied=["training.revival"]), "quick")
    assert [*representatives(frame)["chosen"]] == ["resample"]
    alone = load(sweep(tmp_path / "alone", some[1:], varied=["training.revival"]), "quick")
    assert [*representatives(alone)["chosen"]] == [""]
