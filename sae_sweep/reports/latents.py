"""What `inspect` shows: the latents of an SAE at a glance, and the card of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from sae_sweep.config.settings import Point
from sae_sweep.reports.factor_names import FactorNames
from sae_sweep.reports.layout import Block, Row, bar, columns, fraction, plural
from sae_sweep.reports.live import describe

if TYPE_CHECKING:
    from sae_sweep.reports.latent_dashboard import Dashboard

# Latents of an overview; tokens of a card whose toy has more than twice as many.
_LISTED, _TOKENS = 30, 8


def overview(
    point: Point, metrics: Mapping[str, Any], latents: pd.DataFrame, width: int, coarse_first: bool, whole: bool
) -> RenderableType:
    """An SAE in two lines, and its live latents: in the order given, or by what they stand for, the coarse ones first.

    Without `whole` the first _LISTED of them.
    """
    names = _names(point)
    live = latents[latents["live"]]
    length = [len(label) if isinstance(label, str) else len("mqnc") + 1 for label in live["label"]]
    ordered = live.assign(length=length)
    if coarse_first:
        ordered = ordered.sort_values(["length", "owner", "density"], ascending=[True, True, False])
    listed = len(ordered) if whole else _LISTED
    most = float(ordered["density"].max()) if len(ordered) else 0.0
    cells = max(8, min(60, width - 58))
    rows = [
        Row(
            [
                str(row.latent),
                _shown(row.label_class, str, "none"),
                _shown(row.f1, "{:.2f}".format),
                _shown(row.owner, str),
                _shown(row.purity, "{:.2f}".format),
                f"{density:.2%}",
                bar(density, most, cells),
            ]
        )
        for row, density in zip(ordered.head(listed).itertuples(), ordered["density"].tolist(), strict=False)
    ]
    heads = ["latent", "label", "F1", "owner", "purity", "fires\non", "share of inputs"]
    if _without_cells(metrics):
        rows = [Row([row.cells[0], row.cells[3], row.cells[2], *row.cells[4:]]) for row in rows]
        heads = ["latent", "feature", "F1", "precision", "fires\non", "share of inputs"]
    dead = len(latents) - len(live)
    more = [f"… and {len(live) - listed:,} more: --all"] if len(live) > listed else []
    more += [f"{dead:,} dead"] if dead else []
    parts: list[RenderableType] = [
        Text(f"{point.id}  {describe(point)}", style="bold"),
        *(Text(names.say(line)) for line in _lines(_metrics(metrics), width)),
        Text(),
    ]
    parts.append(columns(heads, [Block("", rows)], width, last_left=True))
    if more:
        parts.append(Text(", ".join(more), style="dim"))
    return Group(*parts, Text(f"sae-sweep inspect {point.id} --latent J   one of them", style="dim"))


def latent_dashboard(dashboard: Dashboard, latent: int, width: int) -> RenderableType:
    """One latent: its label, the cells that it fires on, what it does to the toy's answer."""
    row, names = dashboard.latents.iloc[latent], _names(dashboard.point)
    state = "" if row["live"] else "dead: it fires on too few inputs"
    head = Text(f"latent {latent} of {dashboard.point.id}  {describe(dashboard.point)}", style="bold")
    f1, owner = _shown(row["f1"], "{:.2f}".format), _shown(row["owner"], str)
    facts = [
        f"label {_shown(row['label_class'], str, 'none')}",
        f"F1 {f1}",
        f"owner {owner} with {_shown(row['purity'], '{:.0%}'.format)} of its activation",
    ]
    if dashboard.cells is None:
        facts = [f"detects feature {owner} best", f"F1 {f1}", f"precision {_shown(row['purity'], '{:.2f}'.format)}"]
    facts += [
        f"fires on {row['density']:.2%} ({plural(row['inputs'], 'input')})",
        f"decoder norm {row['decoder_norm']:.3g}",
    ]
    parts: list[RenderableType] = [head, *(Text(fact) for fact in _lines(facts, width)), Text(state)]
    features = dashboard.features[dashboard.features["latent"] == latent]
    if len(features):
        heads = ["feature", "cosine of the\ndecoder row", "F1 as its\ndetector"]
        nearest = features[["feature", "cosine", "f1"]].to_numpy().tolist()
        rows = [Row([f"{feature:.0f}", f"{cosine:+.2f}", f"{f1:.2f}"]) for feature, cosine, f1 in nearest]
        parts += [_heading("Nearest planted features"), columns(heads, [Block("", rows)], width), Text()]
    if dashboard.cells is None:
        parts.append(Text("The features of this toy come and go by themselves: it has no cells.", style="dim"))
    elif len(fires := dashboard.cells[dashboard.cells["latent"] == latent]):
        parts += [
            _heading("Where it is active" + ("" if names.names else ": maximum m, query q, runner-up n, copies c")),
            _cells(fires, width),
            Text(),
        ]
        if dashboard.logits is not None:
            heading = _heading("What it adds to the toy's logits, at its mean activation")
            parts += [heading, *_logits(dashboard.logits[latent].tolist(), width)]
    else:
        parts.append(Text("It never fires."))
    return Group(*parts)


def _names(point: Point) -> FactorNames:
    names = point.toy.get("names")
    return FactorNames(tuple(names.split(", ")) if names else ())


def _lines(facts: Sequence[str], width: int) -> Iterator[str]:
    """The facts side by side, in as many lines as they need."""
    line = facts[0]
    for fact in facts[1:]:
        if len(line) + 3 + len(fact) > width:
            yield line
            line = fact
        else:
            line += f" · {fact}"
    yield line


def _cells(fires: pd.DataFrame, width: int) -> Text:
    most = float(fires["share"].max())
    cells = max(10, min(80, width - 44))
    rows = [
        Row([cell, f"{share:.1%}", f"{of_cell:.0%}", bar(share, most, cells)])
        for cell, share, of_cell in fires[["cell", "share", "fires"]].to_numpy().tolist()
    ]
    heads = ["cell", "of its\nactivation", "of the\ncell", "share of its activation"]
    return columns(heads, [Block("", rows)], width, last_left=True)


def _logits(logits: Sequence[float], width: int) -> Iterator[Text]:
    """Bars to the right for tokens that it speaks for, to the left for those it speaks against."""
    shown = list(enumerate(logits))
    if len(shown) > 2 * _TOKENS:
        ordered = sorted(shown, key=lambda pair: -pair[1])
        shown = [*ordered[:_TOKENS], *ordered[-_TOKENS:]]
    most = max((abs(value) for _, value in shown), default=0.0)
    half = max(8, min(60, (width - 20) // 2))
    for token, value in shown:
        whole = "█" * round(half * abs(value) / most) if most else ""
        line = Text(f"  token {token:>3} {value:+8.3f}  ", no_wrap=True)
        line.append((whole if value < 0 else "").rjust(half), style="red").append("│")
        line.append(bar(value, most, half).rstrip() if value > 0 else "", style="green")
        yield line


def _without_cells(metrics: Mapping[str, Any]) -> bool:
    """Whether the toy's features come and go by themselves: a latent's owner is then the feature it detects best."""
    return metrics.get("owned_maxes") is None


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    shown: dict[str, tuple[str, Any]] = {
        "fvu": ("FVU", fraction),
        "l0": ("L0", "{:.2f}".format),
        "mcc": ("MCC", "{:.2f}".format),
        "found_features": ("found features", str),
        "killed_features": ("killed", str),
        "owned_maxes": ("owned maxes", str),
        "splits_per_max": ("splits per max", "{:.2f}".format),
        "distinct_splits_per_max": ("distinct", "{:.2f}".format),
        "duplicates_per_max": ("duplicates per max", "{:.2f}".format),
    }
    given = ((name, show, metrics.get(key)) for key, (name, show) in shown.items())
    return [f"{name} {show(value)}" for name, show, value in given if value is not None]


def _shown(value: Any, show: Any, missing: str = "–") -> str:
    return missing if value is None or pd.isna(value) else str(show(value))


def _heading(text: str) -> Text:
    return Text(text, style="bold magenta")
