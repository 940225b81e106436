"""The report's files: what the page holds, that it is safe and small, and the command that writes it."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commandline import TINY, call
from fabricated import SMALL, point, sweep
from large import large

from sae_sweep import api
from sae_sweep.config.settings import Point, Toy
from sae_sweep.reports import html, latent_dashboard, report, summary
from sae_sweep.store import results as frame
from sae_sweep.store.store import Store

CLAIM = {"name": "one", "prediction": "A claim", "measure": "splits_per_max", "aggregate": "median", "at_least": 1}


class Page(HTMLParser):
    """A page's text outside scripts and styles, the addresses that its tags name, and its scripts by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.addresses, self.scripts = "", [], {}
        self._inside: tuple[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action", "data") and value]
        if tag in ("script", "style"):
            self._inside = tag, named.get("id")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.text += data
        else:
            self.scripts[self._inside[1]] = data

    def payload(self) -> Any:
        return json.loads(gzip.decompress(base64.b64decode(self.scripts["payload"])))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a small trained sweep: two widths, two penalties, two coefficients, two seeds."""
    root = tmp_path_factory.mktemp("trained")
    words = [word for word in TINY if not word.startswith("sae.width")]
    grid = ["sae.width=5,10", "penalty=l1,sqrt", "penalty.coefficient=0.1,1", "seed=0,1", "name=tiny"]
    result = call("run", *words, *grid, f"output_dir={root}", "--json")
    assert result.code == 0, result.err
    return root


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, written elsewhere."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    result = call("report", "tiny", "--output-dir", str(trained), "--output", str(path))
    assert result.code == 0 and f"report: {path}" in result.err
    return path


def test_the_page_opens_from_disk_with_no_network(page: Path) -> None:
    html = page.read_text()
    read = Page(html)
    assert "default-src 'none'" in html
    local = [address for address in read.addresses if not address.startswith("#")]
    assert local and all((page.parent / address).is_file() for address in local)
    assert len(html) < 2_500_000


def test_json_says_where_the_page_is_and_data_behind_each_figure_loads_with_pandas(trained: Path) -> None:
    found = json.loads(call("report", "tiny", "--output-dir", str(trained), "--json").out)
    assert Path(found["report"]).read_text().startswith("<!doctype html>")
    assert found["points"] == 16
    folder = trained / "sweeps/tiny/figures"
    for name in ("front", "ladder", "split_counts", "distribution", "labels", "information", "phases", "curves"):
        table = pd.read_parquet(folder / f"{name}.parquet")
        assert len(table) and list(table.columns) == list(pd.read_csv(folder / f"{name}.csv").columns)
    table = pd.read_csv(folder / "front.csv")
    results = frame.load(Store(trained), "tiny")
    assert set(table["point_id"].dropna()) == set(results["point_id"])


def test_the_same_records_give_the_same_page_and_elsewhere_nothing_is_written(
    trained: Path, page: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    result = call("report", "tiny", "--output-dir", str(trained), "--output", str(tmp_path / "page.html"))
    assert result.code == 0
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert (tmp_path / "page.html").read_bytes() == page.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="a file in the place of a folder is made with POSIX permissions")
@pytest.mark.slow
def test_where_nothing_can_be_written_the_tables_are_printed_all_the_same(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("report", "tiny", "--output-dir", str(trained), "--output", str(tmp_path / "file/page.html"))
    assert result.code == 4 and "16 of 16 points finished" in result.out
    assert len(result.err.strip().splitlines()) == 1


def test_a_sweep_that_is_not_there(trained: Path) -> None:
    result = call("report", "tinny", "--output-dir", str(trained))
    assert result.code == 2 and "there are: tiny" in result.err


@pytest.mark.slow
def test_points_whose_latents_to_show(trained: Path, tmp_path: Path) -> None:
    ids = list(frame.load(Store(trained), "tiny")["point_id"])
    chosen = ["--latents", ids[3], "--latents", ids[0][:9]]
    call("report", "tiny", "--output-dir", str(trained), "--output", str(tmp_path / "page.html"), *chosen)
    payload = Page((tmp_path / "page.html").read_text()).payload()
    assert [card["id"] for card in payload["cards"] if card["whole"]] == [ids[3], ids[0]]
    # Of the others the page says what their latents stand for.
    assert {card["id"] for card in payload["cards"]} == set(ids)
    result = call("report", "tiny", "--output-dir", str(trained), "--latents", "nowhere")
    assert result.code == 2 and "nowhere" in result.err and not result.out


def test_names_with_markup_are_text(tmp_path: Path) -> None:
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    results = [(point(width=8, seed=seed), {"l0": 1.0, "fvu": 0.1, "splits_per_max": 2.0}) for seed in range(2)]
    store = sweep(
        tmp_path,
        results,
        claims=[{**CLAIM, "prediction": nasty}],
        overrides=[f"name={nasty}"],
        points=3,
    )
    store.fail("quick", "0" * 16, {"reason": nasty})
    assert call("report", "quick", "--output-dir", str(tmp_path)).code == 0
    html = (tmp_path / "sweeps/quick/report.html").read_text()
    page = Page(html)
    assert page.text.count("alert(1)") >= 3
    assert len(re.findall(r"<script", html)) == 3 and "<img src=x" not in html


def test_claims_come_first_with_number_spread_and_null(tmp_path: Path) -> None:
    seeds = [(toy, seed) for toy in range(5) for seed in range(2)]
    results = [
        (point(toy=SMALL.replace(seed=toy), width=8, seed=seed), {"l0": 1.0, "fvu": 0.1, "splits_per_max": 2.0 + seed})
        for toy, seed in seeds
    ]
    sweep(tmp_path, results, claims=[CLAIM])
    assert call("report", "quick", "--output-dir", str(tmp_path)).code == 0
    html = (tmp_path / "sweeps/quick/report.html").read_text()
    assert html.index('id="claims"') < html.index('id="front"')
    text = " ".join(Page(html).text.split())
    assert "✓ supported" in text and "2 to 3" in text and "at least 1" in text
    cells = re.findall(r'data-is="(Measured|[^"]*\(null\))"[^>]*>([^<]+)<', html)
    assert cells == [("Measured", "2.5"), ("Untrained (null)", "0"), ("Labels shuffled (null)", "0")]


def test_a_claim_that_failed_points_at_the_figure_that_shows_it(tmp_path: Path) -> None:
    seeds = [(toy, seed) for toy in range(5) for seed in range(2)]
    results = [
        (
            point(toy=SMALL.replace(seed=toy), width=8, seed=seed),
            {"l0": 1.0, "fvu": 0.1, "splits_per_max": 0.5 + 0.1 * seed, "mcc": 0.5, "found_mq": 0.5},
        )
        for toy, seed in seeds
    ]
    # What MCC is along a ladder is drawn only where there is one.
    measures = {"splits_per_max": "split_counts", "label_mq - label_m": "labels", "loss": "", "mcc": ""}
    measures["found_mq"] = "found"
    claims = [{**CLAIM, "name": name, "measure": name} for name in measures]
    sweep(tmp_path, results, claims=[*claims, {**CLAIM, "name": "fine", "at_least": 0.1}])
    assert call("report", "quick", "--output-dir", str(tmp_path)).code == 0
    html = (tmp_path / "sweeps/quick/report.html").read_text()
    links = re.findall(r'See <a href="#(\w+)">', html)
    assert links == [key for key in measures.values() if key]
    assert all(f'<section id="{key}"' in html for key in links)


def test_words_are_explained_where_they_first_stand() -> None:
    explained = html._Explained()
    first, second = explained("FVU < L0, not FVU_2; FVU"), explained("FVU and oracle")
    assert first.count('role="note"') == 2 and "&lt;" in first and second.count('role="note"') == 1
    assert ">oracle</span>" in second


def test_only_questions_are_the_question() -> None:
    text = "# A minute. Does it split? Settings from a pilot. By which factor?\n"
    info = {"experiment": "mine", "files": {"mine.yaml": text}}
    assert summary.question(info) == "Does it split? By which factor?"
    assert summary.question(info | {"files": {"mine.yaml": "# A ladder of widths."}}) == "A ladder of widths."


@pytest.mark.slow
def test_what_only_some_toys_have_is_not_said_of_all(tmp_path: Path) -> None:
    planted = Toy(name="parents", features=4)
    sweep(tmp_path, [(point(), {"l0": 1.0, "fvu": 0.1}), (point(toy=planted), {"l0": 1.0, "fvu": 0.1})])
    assert call("report", "quick", "--output-dir", str(tmp_path)).code == 0
    text = " ".join(Page((tmp_path / "sweeps/quick/report.html").read_text()).text.split())
    assert "2 of 2 points finished What do the latents stand for?" in text


def test_a_sweep_with_nothing_finished(tmp_path: Path) -> None:
    sweep(tmp_path, [], points=4, claims=[CLAIM])
    assert call("report", "quick", "--output-dir", str(tmp_path)).code == 0
    page = (tmp_path / "sweeps/quick/report.html").read_text()
    assert not any(f'{what}{key}"' in page for what in ('id="', 'href="#') for key in ("latents", "table", "front"))
    text = Page(page).text
    assert "0 of 4 points finished" in text and "Nothing was measured." not in text and "undecided" in text


@pytest.mark.slow
def test_five_hundred_points_stay_below_five_megabytes(tmp_path: Path) -> None:
    large(tmp_path, coefficients=4, starts=5, seeds=1)
    result = call("report", "large", "--output-dir", str(tmp_path), "--json")
    page = Path(json.loads(result.out)["report"])
    # With room for all the latents that a page may hold, in base64.
    assert page.stat().st_size + 4 / 3 * 1_400_000 < 5_000_000
    assert "is not in" in Page(page.read_text()).text  # made-up points have no toy whose latents could be shown


def test_cards_say_what_the_stored_sae_does(trained: Path) -> None:
    store = Store(trained)
    results = frame.load(store, "tiny")
    id = results[results["width"] == 10]["point_id"].iloc[0]
    other = latent_dashboard.narrower(results, id)
    row, found = (results.set_index("point_id").loc[name] for name in (id, other))
    assert found["width"] == 5
    assert all(found[name] == row[name] for name in ("penalty", "coefficient", "seed", "init"))
    card = latent_dashboard.DashboardBuilder(store).build(id, other)
    sae, toy = api.load_sae(id, trained), api.load_toy(id, trained)
    directions = toy.logits(sae.W_dec, "pre_unembed").numpy()
    directions = directions - directions.mean(axis=1, keepdims=True)
    for latent in set(card.cells["latent"]):  # what is added is a positive multiple of the decoder row's logits
        scale = card.logits[latent] @ directions[latent] / (directions[latent] @ directions[latent])
        assert scale > 0 and card.logits[latent] == pytest.approx(scale * directions[latent], rel=1e-3, abs=1e-5)
    shares = card.cells.groupby("latent")["share"].sum()
    assert (shares <= 1 + 1e-9).all() and card.cells["fires"].between(0, 1 + 1e-9).all()
    near = card.nearest[card.nearest["latent"] == 4]
    assert list(near["cosine"]) == sorted(near["cosine"], reverse=True)
    rows = sae.W_dec[4] / sae.W_dec[4].norm(), api.load_sae(other, trained).W_dec
    cosines = (rows[1] / rows[1].norm(dim=1, keepdim=True)) @ rows[0]
    assert near["cosine"].iloc[0] == pytest.approx(float(cosines.max()), abs=1e-5)
    assert near["other"].iloc[0] == int(cosines.argmax())


@pytest.mark.slow
def test_an_sae_is_its_folders_whatever_its_settings_are_called_today(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a kind's version has risen, the settings of an older SAE have another id than its folder."""
    monkeypatch.setattr(Point, "id", property(lambda self: "0" * 16))
    target = tmp_path / "page.html"
    assert call("report", "tiny", "--output-dir", str(trained), "--output", str(target)).code == 0
    cards = Page(target.read_text()).payload()["cards"]
    assert {card["id"] for card in cards} == set(frame.load(Store(trained), "tiny")["point_id"])


def test_saes_worth_a_look(trained: Path) -> None:
    results = frame.load(Store(trained), "tiny")
    chosen = results.set_index("point_id").loc[latent_dashboard.choose(results)]
    assert set(chosen["width"]) == {5, 10}
    assert chosen["width"].iloc[0] == 10
    assert chosen["on_front"].iloc[0]


def test_images_need_a_browser_and_say_so(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_browser", lambda: False)
    result = call("report", "tiny", "--output-dir", str(trained), "--images")
    assert result.code == 4 and "apt install chromium" in result.err
    assert len(result.err.strip().splitlines()) == 1
