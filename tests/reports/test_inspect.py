"""`inspect`: the latents of an SAE, and the card of one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commandline import TINY, call

from sae_sweep.api import load_sae, load_sweep, load_toy


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect") / "outputs"
    assert call("run", "--json", *TINY, "name=tiny", f"output_dir={place}").code == 0
    return place


@pytest.fixture(scope="module")
def point(root: Path) -> str:
    return str(load_sweep("tiny", root)["point_id"][0])


@pytest.mark.parametrize("width", [80, 120, 200])
def test_an_overview_fits_and_lists_what_is_live(
    root: Path, point: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for words in ((), ("--latent", "0")):
        end = call("inspect", point, *words, "--output-dir", str(root))
        assert (end.code, end.err) == (0, "")
        assert "\x1b" not in end.out and max(map(len, end.out.splitlines())) <= width
    latents = load_sae(point, root).latents
    listed = re.findall(r"^(\d+) +(?!dead)", call("inspect", point[:8], "--output-dir", str(root)).out, re.MULTILINE)
    assert sorted(map(int, listed)) == list(latents.index[latents["live"]])
    whole = json.loads(call("inspect", point, "--json", "--output-dir", str(root)).out)
    assert [row["f1"] for row in whole["latents"]] == pytest.approx(latents["f1"].to_list(), nan_ok=True)


def test_a_card_says_what_the_latent_does(root: Path, point: str) -> None:
    sae, toy = load_sae(point, root), load_toy(point, root)
    latent = int(sae.latents["density"].idxmax())
    told = json.loads(call("inspect", point, "--latent", str(latent), "--json", "--output-dir", str(root)).out)
    assert told["point"] == point and told["latent"] == latent
    assert sum(row["share"] for row in told["cells"]) <= 1 + 1e-9
    owner = sae.latents["owner"][latent]
    assert told["cells"][0]["cell"].startswith(f"m={owner},")
    # What a unit of the latent adds to the logits, but for the mean: the same direction.
    added = toy.logits(sae.W_dec[[latent]], sae.point.site.name)[0]
    added -= added.mean()
    scale = told["logits"][0] / float(added[0])
    assert scale > 0 and told["logits"] == pytest.approx([scale * float(value) for value in added], rel=1e-3)
    text = call("inspect", point, "--latent", str(latent), "--output-dir", str(root)).out
    bars = {int(token): line for token, line in re.findall(r"token +(\d+) +\S+ (.*)$", text, re.MULTILINE)}
    assert set(bars) == set(range(5))
    for token, line in bars.items():
        left, right = line.split("│")
        assert not (left.strip() if told["logits"][token] > 0 else right.strip())
    assert any(line.split("│")[1].strip() for line in bars.values())


def test_what_is_not_there_is_one_line(root: Path, point: str) -> None:
    for words, said in (
        (("zz",), "there is no finished point 'zz'"),
        ((point, "--latent", "5"), "has latents 0 to 4"),
        ((point, "--latent", "-1"), "has latents 0 to 4"),
    ):
        end = call("inspect", *words, "--output-dir", str(root))
        assert end.code == 2 and said in end.err and len(end.err.splitlines()) == 1


@pytest.mark.parametrize("toy", ["independent", pytest.param("parents", marks=pytest.mark.slow)])
def test_planted_features_are_named(
    toy: str, tmp_path: Path, few_inputs_for_constants: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = [f"toy={toy}", "sae.width=12", "penalty=l1", "penalty.coefficient=0.1", "training.steps=60", "logger=none"]
    assert call("run", "--json", *words, "evaluation.inputs=4000", "name=planted", f"output_dir={tmp_path}").code == 0
    point = str(load_sweep("planted", tmp_path)["point_id"][0])
    sae, toy_model = load_sae(point, tmp_path), load_toy(point, tmp_path)
    whole = call("inspect", point, "--output-dir", str(tmp_path)).out
    latent = int(sae.latents["density"].idxmax())
    told = json.loads(call("inspect", point, "--latent", str(latent), "--json", "--output-dir", str(tmp_path)).out)
    row, directions = sae.W_dec[latent].double(), toy_model.directions.double()
    cosines = directions @ row / directions.norm(dim=1) / row.norm()
    for feature in told["features"]:
        assert feature["cosine"] == pytest.approx(float(cosines[feature["feature"]]), abs=1e-5)
    assert told["features"][0]["cosine"] == pytest.approx(float(cosines.max()), abs=1e-5)
    text = call("inspect", point, "--latent", str(latent), "--output-dir", str(tmp_path)).out
    assert "Nearest planted features" in text and max(map(len, (whole + text).splitlines())) <= 80
    if toy == "independent":
        assert "precision" in whole and "owner" not in whole
        # The F1 of the feature that it detects best is the stored one.
        best = {feature["feature"]: feature["f1"] for feature in told["features"]}
        assert told["cells"] is None and best.get(told["owner"], told["f1"]) == pytest.approx(told["f1"])
        assert "it has no cells" in text
    else:
        assert told["cells"] and "Where it is active" in text
