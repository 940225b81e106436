"""What the points of a pack share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae_sweep.config.settings import Toy
from sae_sweep.errors import UserError
from sae_sweep.store.store import Store
from sae_sweep.sweep import context
from sae_sweep.toys import model

TOY = Toy(name="independent", d_vocab=8, d_model=8)


def test_a_toy_that_cannot_be_loaded_is_trained_anew_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever refuses it, which need not be damage, would refuse it for ever."""
    store, load, tries = Store(tmp_path), model.load, list[int]()

    def loading(toy: Toy, tensors: Any) -> Any:
        tries.append(1)
        if len(tries) <= refused:
            raise ValueError("no such tensor")
        return load(toy, tensors)

    monkeypatch.setattr(model, "load", loading)
    refused = 1
    assert context.trained_toy(TOY, store, "cpu", lambda event: None) is not None and len(tries) == 2
    tries.clear()
    refused = 9
    with pytest.raises(UserError, match=r"cannot be loaded, though it was just trained anew: .*no such tensor"):
        context.trained_toy(TOY, store, "cpu", lambda event: None)
    assert len(tries) == 2
