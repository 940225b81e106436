"""A trained SAE: a point of the store by its id, or an SAE of any library by its folder or file.

`sae.init=0123456789abcdef` or `sae.init=path/to/folder` chooses it. A point of another architecture serves too: weights
and biases are taken over, and what the architecture has beside them is as in an untrained SAE.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.errors import UserError
from sae_sweep.registry import Setting, register
from sae_sweep.saes.inits import Init

if TYPE_CHECKING:
    import torch

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
    from sae_sweep.saes.parameters import Parameters

POINT = re.compile(r"[0-9a-f]{16}")


def _make(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    made = source.trained(point.sae)
    width, d = made.W_dec.shape
    if (width, d) != (point.sae.width, source.covariance().shape[0]):
        raise UserError(
            f"sae.init={point.sae.start} has {width} latents of {d} numbers, "
            f"wanted sae.width={point.sae.width} of {source.covariance().shape[0]}"
        )
    return made


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `start` is known by: a point by its id, files by a digest of their content. UserError: there are none."""
    start = settings.get("start")
    if start is None:
        raise UserError("sae.init=trained is chosen by naming an SAE: sae.init=POINT or sae.init=FOLDER")
    if POINT.fullmatch(start):
        return {"start_digest": start}
    path = Path(start).expanduser().resolve()
    try:
        files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
        content = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    except OSError as error:
        raise UserError(f"sae.init={start}: {error.strerror or error}") from error
    return {"start": str(path), "start_digest": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}


register(
    Init(
        name="trained",
        make=_make,
        resolve=resolve,
        offered=False,
        description="a trained SAE: sae.init=POINT, the id of a finished point, or sae.init=FOLDER, of any library",
        source="–",
        settings={
            "start": Setting(None, "the point or the folder", kind="str", optional=True, told=False, given=False),
            "start_digest": Setting(None, "of its content", kind="str", optional=True, given=False),
        },
    )
)
