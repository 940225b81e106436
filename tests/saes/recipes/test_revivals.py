"""Dead latents and their revival: as plain PyTorch does it, of each SAE by itself, and of all that a latent has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stacks import PENALTIES, batches, points, stack_of

from sae_sweep.config.settings import Point, derive_seed
from sae_sweep.kernels.cpu import backend as cpu_backend
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.kernels.cpu.sparse_encode import Lister
from sae_sweep.registry import kinds
from sae_sweep.saes.recipes.revivals import resample, responses
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import BLOCK, AutogradBackend, Backend, Look, revive, train
from sae_sweep.sweep.cost import by_autograd, step_seconds
from sae_sweep.sweep.hardware_profile import SPEEDS
from sae_sweep.sweep.plan import stack_key

STEPS = 4 * BLOCK
AUXK: dict[str, Any] = {"revival": "auxk", "dead_after": BLOCK, "aux_k": 5, "aux_coefficient": 0.5, "steps": STEPS}
RESAMPLE: dict[str, Any] = {"revival": "resample", "revival_every": BLOCK, "revival_until": 0.5, "steps": STEPS}
RESAMPLE |= {"dead_after": BLOCK}
BOTH = {**AUXK, **RESAMPLE, "revival": "both"}


class Data:
    """Batches by step."""

    def __init__(self) -> None:
        self.all = batches(STEPS)

    def batches(self, start_step: int, count: int) -> torch.Tensor:
        return self.all[start_step : start_step + count]


def trained(chosen: list[Point], backend: Backend, pool: ThreadPoolExecutor | None = None) -> tuple[Stack, list[Look]]:
    stack = stack_of(chosen)
    return stack, list(train(stack, Data(), backend, pool))


def by_pytorch(stack: Stack) -> tuple[torch.Tensor, list[int]]:
    """A TopK1 SAE under torch.optim.Adam, its dead latents under AuxK, or resampled after steps 25 and 50; and how many
    these were."""
    training, counts = stack.points[0].training, []
    silent = torch.zeros(stack.width)
    parameters = [view[0].clone().requires_grad_() for view in stack.split(stack.flat)]
    W_enc, W_dec, b_enc, b_dec = parameters
    optimizer = torch.optim.Adam(parameters)
    seen: list[torch.Tensor] = []

    def codes_of(x: torch.Tensor) -> torch.Tensor:
        codes = (x @ W_enc.T + b_enc).relu()
        winner = (codes * W_dec.norm(dim=1)).argmax(1, keepdim=True)
        return torch.zeros_like(codes).scatter(1, winner, codes.gather(1, winner))

    for step, x in enumerate(Data().all):
        rise, fall = (step + 1) / (training.lr_warmup * STEPS), (STEPS - step) / (training.lr_decay * STEPS)
        optimizer.param_groups[0]["lr"] = training.lr * min(1.0, rise, fall)
        optimizer.zero_grad()
        codes = codes_of(x)
        silent = torch.where((codes > 0).any(0), 0, silent + 1)
        loss = (codes @ W_dec + b_dec - x).square().sum(1).mean()
        if training.revival != "resample" and (silent >= BLOCK).any():
            missed = (x - codes @ W_dec - b_dec).detach()
            of_dead = (x @ W_enc.T + b_enc).relu() * (silent >= BLOCK)
            fifth = (of_dead * W_dec.norm(dim=1)).topk(training.aux_k, dim=1).values[:, -1:]
            of_dead = of_dead * (of_dead * W_dec.norm(dim=1) >= fifth)
            loss = loss + training.aux_coefficient * (of_dead @ W_dec - missed).square().sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        optimizer.step()
        seen = [*seen, x][-BLOCK:]
        if step + 1 not in (BLOCK, 2 * BLOCK) or training.revival == "auxk":
            continue
        with torch.no_grad():
            inputs = torch.cat(seen)
            codes = codes_of(inputs)
            dead = torch.nonzero(silent >= BLOCK).flatten()
            chances = (codes @ W_dec + b_dec - inputs).square().sum(1)
            generator = torch.Generator().manual_seed(derive_seed("revival", "topk", len(W_dec), 0, step + 1))
            rows = F.normalize(inputs[torch.multinomial(chances, len(dead), generator=generator)] - b_dec, dim=1)
            W_enc[dead], W_dec[dead], b_enc[dead] = 0.8 * rows, rows, -0.8 * (rows @ b_dec)
            for parameter in (W_enc, W_dec, b_enc):
                for moments in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[parameter][moments][dead] = 0
            silent[dead] = 0
            counts.append(len(dead))
    return torch.cat([parameter.detach().flatten() for parameter in parameters]), counts


def test_no_revival_is_left_out() -> None:
    assert {recipe["revival"] for recipe in (RESAMPLE, AUXK, BOTH)} | {"none"} == set(kinds("revival"))


@pytest.mark.parametrize("recipe", [RESAMPLE, AUXK, BOTH])
def test_as_plain_pytorch(recipe: dict[str, Any]) -> None:
    # At a scale of 1 the encoder's gradient starts at exactly 0: rounding, which Adam makes whole steps of.
    settings = recipe if recipe is AUXK else {**recipe, "revival_scale": 0.8}
    chosen = points(PENALTIES[-1:], "topk", width=200, k=1, **settings)
    expected, counts = by_pytorch(stack_of(chosen))
    stack, looks = trained(chosen, AutogradBackend())
    if recipe is RESAMPLE:
        assert min(counts) > 0
        assert [int(look.revived) for look in looks] == [*counts, 0, 0]
        assert (int(stack.revived), int(stack.last_revived)) == (sum(counts), counts[-1])
        assert counts[-1] < int(stack.ever_revived.sum()) <= sum(counts)
    # A latent within rounding of the k-th largest is chosen in one and not in the other.
    close = torch.isclose(stack.flat[0], expected, rtol=1e-3, atol=1e-4)
    assert close.all() if recipe is RESAMPLE else close.float().mean() > 0.99
    plain, _ = trained(points(PENALTIES[-1:], "topk", width=200, k=1, steps=STEPS), AutogradBackend())
    assert (plain.flat[0] - stack.flat[0]).abs().max() > 1e-2, "revival is to make a difference"


def test_a_latent_that_an_auxiliary_loss_brings_back_counts_as_revived() -> None:
    stack = stack_of(points(PENALTIES[-1:], "topk", width=6, k=1, revival="auxk", dead_after=30))
    stack.dead[0, [1, 4]] = True
    stack.silent[0] = torch.tensor([0, 3, 0, 99, 99, 29])
    revived, dead = revive(stack, batches(1), responses, None)
    assert (revived.tolist(), dead.tolist()) == ([1.0], [2.0])
    assert torch.nonzero(stack.ever_revived[0]).flatten().tolist() == [1]
    assert torch.nonzero(stack.dead[0]).flatten().tolist() == [3, 4]


def test_auxk_is_trained_in_stacks_of_its_own_by_compiled_steps_where_these_know_it() -> None:
    aux, none = points(PENALTIES[:1], **AUXK)[0], points(PENALTIES[:1], steps=STEPS)[0]
    resampled = points(PENALTIES[:1], **RESAMPLE)[0]
    cpu = SPEEDS["cpu"]
    for architecture, compiled in (("relu", True), ("topk", True), ("batchtopk", True), ("jumprelu", False)):
        assert by_autograd(points(PENALTIES[:1], architecture, **AUXK)[0], cpu) is not compiled
    assert not by_autograd(resampled, cpu)
    assert by_autograd(resampled, SPEEDS["cuda"]) and not by_autograd(none, SPEEDS["cuda"])
    assert stack_key(aux) != stack_key(none) == stack_key(resampled)
    adamw = points(PENALTIES[:1], optimizer="adamw")[0]
    assert step_seconds(none, cpu) < step_seconds(aux, cpu) < step_seconds(adamw, cpu)


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        ("topk", BOTH),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("topk", RESAMPLE), ("batchtopk", RESAMPLE), ("batchtopk", BOTH))
        ),
    ],
)
def test_stacked_as_alone_on_any_threads(architecture: str, recipe: dict[str, Any]) -> None:
    chosen = points(PENALTIES[:3], architecture, width=100, **recipe)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together, looks = trained(chosen, AutogradBackend(pool), pool)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for i, point in enumerate(chosen):
            alone, own = trained([point], AutogradBackend(pool), pool)
            assert torch.equal(alone.flat[0], together.flat[i])
            assert torch.equal(alone.second[0], together.second[i])
            assert torch.equal(alone.silent[0], together.silent[i])
            assert [float(look.revived) for look in own] == [float(look.revived[i]) for look in looks]
    assert int(together.revived.sum()) > 0


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "topk"])
def test_all_that_a_dead_latent_has_starts_again_and_nothing_else_changes(architecture: str) -> None:
    stack = stack_of(points(PENALTIES[:2], architecture, width=30, revival="resample", dead_after=125))
    AutogradBackend().advance(stack, batches(5))
    W_enc, W_dec, b_enc, b_dec = stack.split(stack.flat[0])
    dead = [3, 17]
    stack.silent[0], stack.silent[0, dead] = 0, 125
    before, data = stack.flat.clone(), batches(2)
    revived = resample(stack, 0, data)
    views, old = stack.views(stack.flat[0]), stack.views(before[0])
    assert torch.nonzero(revived).flatten().tolist() == dead
    assert torch.equal(stack.flat[1], before[1]) and torch.equal(b_dec, old[3])
    for view, as_it_was in zip([*views[:3], *views[4:]], [*old[:3], *old[4:]], strict=True):
        assert torch.equal(view[~revived], as_it_was[~revived])
    for moments in (stack.first[0], stack.second[0]):
        for i, view in enumerate(stack.views(moments)):
            assert i == 3 or not view[revived].any()
    rows = F.normalize(data.flatten(0, 1) - b_dec, dim=1)
    alike = W_dec[dead] @ rows.T
    assert (alike.amax(1) > 1 - 1e-5).all(), "each looks along an input"
    assert len(set(alike.argmax(1).tolist())) == len(dead), "of its own"
    living = float(old[0][~revived].norm(dim=1).mean())
    expected = 1.0 if architecture == "topk" else 0.2 * living
    torch.testing.assert_close(W_enc[dead].norm(dim=1), torch.full((2,), expected))
    torch.testing.assert_close(b_enc[dead], -(W_enc[dead] @ b_dec))


@pytest.mark.parametrize("architecture", ["relu", "tied", "topk", "batchtopk", "jumprelu"])
def test_a_wide_sae_responds_by_lists_as_by_dense_codes(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cpu_backend, "LISTED_AT_LEAST", 30)
    monkeypatch.setattr(cpu_backend, "Lister", lambda *given: asked.append(given) or Lister(*given))
    stack, data = stack_of(points(PENALTIES[:2], architecture, width=30)), batches(3)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        backend = CpuBackend(pool, 1)
        AutogradBackend().advance(stack, batches(5))
        fired, errors = backend.responses(stack, 1, data)
    expected_fired, expected = responses(stack, 1, data)
    assert torch.equal(fired, expected_fired) and fired.any()
    torch.testing.assert_close(errors, expected)
    assert len(asked) == (architecture not in ("batchtopk", "jumprelu")), "a whole batch decides these"


def test_where_none_is_dead_no_input_is_asked() -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("asked")

    stack = stack_of(points(PENALTIES[:1], "topk", width=30, revival="resample", dead_after=125))
    stack.silent[0] = 124
    assert not resample(stack, 0, batches(1), refused).any()


def test_inputs_are_drawn_by_their_error_or_all_alike() -> None:
    """Two kinds of inputs, one of them reconstructed exactly: only from `all` does a latent start there."""
    d = 16
    data = torch.eye(d)[[0, 1] * 32][None]
    for source, drawn_from in (("loss", {1}), ("all", {0, 1})):
        stack = stack_of(points(PENALTIES[:1], "topk", width=21, k=1, revival="resample", revival_source=source))
        stack.flat.zero_()
        W_enc, W_dec, b_enc, _ = stack.split(stack.flat[0])
        W_enc[0, 0] = W_dec[0, 0] = 1.0
        W_dec[1:, 2], b_enc[1:] = 1.0, -1.0
        revived = resample(stack, 0, data)
        assert revived.tolist() == [False] + [True] * 20
        assert set(W_dec[1:].argmax(1).tolist()) == drawn_from


@pytest.mark.parametrize(
    ("every", "until", "expected"), [(25, 1.0, [25, 50, 75, 100]), (30, 1.0, [50, 75, 100]), (50, 0.5, [50])]
)
def test_it_happens_as_a_block_ends(every: int, until: float, expected: list[int]) -> None:
    chosen = points(PENALTIES[-1:], "topk", 200, 1, **{**RESAMPLE, "revival_every": every, "revival_until": until})
    _, looks = trained(chosen, AutogradBackend())
    assert [look.step for look in looks if look.revived.any()] == expected
