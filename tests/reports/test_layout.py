"""Tables of the terminal."""

from __future__ import annotations

from sae_sweep.reports.layout import Block, Row, columns

ROWS = [Row(["16 kmeans", "l1", "0.25"]), Row(["136 random_unit tree=none", "topk resample", "1.00"])]


def test_words_without_room_beside_them_have_a_line_of_their_own() -> None:
    """No number is cut off, as long as the heads have room."""
    wide = columns(["width, init", "penalty", "\nL0"], [Block("", ROWS)], 80).plain.splitlines()
    assert wide[-1].split() == ["136", "random_unit", "tree=none", "topk", "resample", "1.00"]
    narrow = columns(["width, init", "penalty", "\nL0"], [Block("", ROWS)], 32).plain.splitlines()
    assert max(map(len, narrow)) <= 32
    assert [line.split() for line in narrow[-3:]] == [
        ["16", "kmeans", "l1", "0.25"],
        ["136", "random_unit", "tree=none"],
        ["topk", "resample", "1.00"],
    ]
    assert narrow[-3].index("0.25") == narrow[-1].index("1.00")
