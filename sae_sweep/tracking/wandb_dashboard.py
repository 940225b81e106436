"""Save the views of a sweep in W&B; those of an earlier call are replaced where they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sae_sweep.errors import EnvironmentProblem
from sae_sweep.tracking.wandb_client import own_environment, set_up

if TYPE_CHECKING:
    import pandas as pd
    from wandb_workspaces.workspaces import Workspace


def save(
    folder: Path, sweep: str, frame: pd.DataFrame, varied: Sequence[str], project: str, entity: str | None
) -> dict[str, str]:
    """Save the views; returns the URL of each by its name. EnvironmentProblem: no key, or no server.

    folder: the sweep's `wandb` folder, which remembers where the views are.
    """
    known = folder / "views.json"
    with own_environment(folder):
        client = set_up("online")
        try:
            from sae_sweep.tracking.wandb_views import views

            found = views(sweep, frame, varied, entity or client.Api().default_entity, project)
            saved = {view.name: _save(view, _read(known).get(view.name)) for view in found}
        except Exception as problem:
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            raise EnvironmentProblem(
                f"W&B: nothing saved ({reason}); --json prints the views all the same"
            ) from problem
        finally:
            client.teardown()
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(saved, indent=1))
    return {name: place["url"] for name, place in saved.items()}


def _save(view: Workspace, known: dict[str, str] | None) -> dict[str, str]:
    """Save a view, in place of the one known; says where it is."""
    if known is not None:
        # Not by Workspace.from_url: it reads the whole view back, and refuses those that a newer app has written.
        view._internal_name, view._internal_id = known["name"], known["id"]
        with suppress(Exception):  # deleted since, or of another account: a new one then
            view.save()
            return known
        view._internal_name = view._internal_id = ""
    view.save()
    return {"url": view.url, "name": view._internal_name, "id": view._internal_id}


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
