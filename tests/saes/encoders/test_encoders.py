"""Encoders, against plain PyTorch doing the same; what they begin as, which architectures they go with, their files."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from stacks import PENALTIES, batches, points, stack_of, start_of
from torch import Tensor

from sae_sweep.config.overrides import load as configured
from sae_sweep.config.settings import Encoder, Penalty, Point
from sae_sweep.errors import UserError
from sae_sweep.registry import kinds
from sae_sweep.saes.architectures import architecture_of
from sae_sweep.saes.encoders import encoder_of
from sae_sweep.saes.encoders.matching_pursuit import by_projection
from sae_sweep.saes.folding import fold, unfold
from sae_sweep.saes.formats import saelens
from sae_sweep.saes.formats.index import read_sae
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.recipes.revivals import resample
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend
from sae_sweep.store.tensors import to_bytes
from sae_sweep.sweep.cost import by_autograd, step_seconds
from sae_sweep.sweep.hardware_profile import SPEEDS
from sae_sweep.sweep.plan import stack_key

MLP, ISTA, LISTA, PURSUIT = (
    Encoder("mlp", hidden=24),
    Encoder("ista", steps=2),
    Encoder("lista", steps=3),
    Encoder("matching_pursuit"),
)
CASES = [(MLP, "relu"), (MLP, "gated"), (ISTA, "relu"), (ISTA, "topk"), (LISTA, "jumprelu"), (LISTA, "batchtopk")]
CASES += [(PURSUIT, "topk")]


def point_of(encoder: Encoder, architecture: str, **changes: object) -> Point:
    (point,) = points([PENALTIES[0]], architecture)
    return dataclasses.replace(point, encoder=encoder, **changes)


def plain_codes(x: Tensor, p: dict[str, Tensor], encoder: Encoder, k: int | None) -> Tensor:
    """Codes by the formulas of the listing, one SAE, of ReLU (k: None) and TopK."""

    def kept(pre: Tensor) -> Tensor:
        codes = pre.clamp(min=0)
        if k is None:
            return codes
        smallest = (codes * p["W_dec"].norm(dim=1)).topk(k, dim=1).values[:, -1:]
        return torch.where(codes * p["W_dec"].norm(dim=1) >= smallest, codes, 0.0)

    if encoder.name == "mlp":
        hidden = torch.relu(x @ p["W_hidden"].T + p["b_hidden"])
        return kept(x @ p["W_enc"].T + p["b_enc"] + hidden @ p["W_out"].T)
    left = x - p["b_dec"]
    if encoder.name == "matching_pursuit":
        codes = x.new_zeros(len(x), len(p["W_dec"]))
        units = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
        for _ in range(k or 0):
            best = (left @ units.T).argmax(1)
            reach = (left * units[best]).sum(1).clamp(min=0)
            left = left - reach[:, None] * units[best]
            codes = (
                codes + torch.nn.functional.one_hot(best, len(units)) * (reach / p["W_dec"].norm(dim=1)[best])[:, None]
            )
        return codes
    W_enc = p["log_gain"].exp()[:, None] * p["W_dec"]
    codes = torch.zeros(len(x), len(W_enc))
    for _ in range(encoder.steps + 1):
        codes = kept(codes + (left - codes @ p["W_dec"]) @ W_enc.T + p["b_enc"])
    return codes


@pytest.mark.parametrize(
    ("encoder", "architecture"), [(MLP, "relu"), (ISTA, "relu"), (ISTA, "topk"), (PURSUIT, "topk")]
)
def test_stacked_as_single_runs_in_plain_pytorch(encoder: Encoder, architecture: str) -> None:
    chosen = [dataclasses.replace(point_of(encoder, architecture), seed=seed) for seed in range(2)]
    stack, data = stack_of(chosen), batches(20)
    named = stack.named(stack.flat)
    k = 3 if architecture == "topk" else None
    expected = []
    for i, point in enumerate(chosen):
        p = {name: tensor[i].clone().requires_grad_() for name, tensor in named.items()}
        optimizer = torch.optim.Adam(p.values(), lr=0.0)
        for step, x in enumerate(data):
            codes = plain_codes(x, p, encoder, k)
            loss = (codes @ p["W_dec"] + p["b_dec"] - x).square().sum(1).mean()
            loss = loss + (codes * p["W_dec"].norm(dim=1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(p.values(), point.training.clip)
            optimizer.param_groups[0]["lr"] = stack.schedule(i, step)[0]
            optimizer.step()
        expected.append(torch.cat([tensor.detach().flatten() for tensor in p.values()]))
    before = stack.flat.clone()
    AutogradBackend().advance(stack, data)
    torch.testing.assert_close(stack.flat, torch.stack(expected), rtol=1e-3, atol=5e-5)
    assert (stack.flat - before).abs().max() > 1e-2


@pytest.mark.parametrize(("encoder", "architecture"), CASES)
def test_bits_depend_on_neither_pack_nor_threads(encoder: Encoder, architecture: str) -> None:
    chosen = [dataclasses.replace(point_of(encoder, architecture), seed=seed) for seed in range(3)]
    together, data = stack_of(chosen), batches(3)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        AutogradBackend(pool).advance(together, data)
    for i, point in enumerate(chosen):
        alone = stack_of([point])
        AutogradBackend().advance(alone, data)
        assert torch.equal(alone.flat[0], together.flat[i])


def test_matching_pursuit_takes_the_row_of_largest_projection() -> None:
    W_dec = torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.6, 0.6], [0.0, 0.0]])
    b_dec = torch.tensor([1.0, 1.0])
    sae = by_projection(Parameters(W_dec, W_dec, torch.zeros(4), b_dec, torch.zeros(())))
    x = b_dec + torch.tensor([[2.0, 0.1], [0.1, 2.0], [1.0, 1.0], [-1.0, -1.0], [3.0, 1.0]])

    def codes(k: int) -> Tensor:
        point = point_of(PURSUIT, "topk")
        return architecture_of("topk").codes(x, sae, point.sae.replace(width=4, k=k), encoder=PURSUIT)

    one = torch.tensor([[2 / 3, 0, 0, 0], [0, 4, 0, 0], [0, 0, 1 / 0.6, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(codes(1), one)
    torch.testing.assert_close(codes(2)[4], torch.tensor([1.0, 2, 0, 0]))
    assert (codes(2)[2] == codes(1)[2]).all(), "nothing is left of it"


@pytest.mark.parametrize(("encoder", "architecture"), CASES)
def test_files_hold_the_same_sae(encoder: Encoder, architecture: str, tmp_path: Path) -> None:
    point = point_of(encoder, architecture)
    stack, mean, x = stack_of([point]), torch.linspace(-2, 2, 16), batches(1)[0] * 2
    AutogradBackend().advance(stack, batches(3))
    stack.threshold[0] = 0.4
    used = stack.parameters(0)
    files = saelens.to_files(point, fold(used.map(lambda tensor: tensor.detach()), mean, 0.37))
    back = unfold(saelens.from_files(files[saelens.WEIGHTS]), mean, 0.37)
    kind = architecture_of(architecture)
    codes = kind.codes(x, used, point.sae, encoder=encoder)
    torch.testing.assert_close(kind.codes(x, back, point.sae, encoder=encoder), codes, atol=1e-4, rtol=1e-4)
    assert (codes > 0).any()
    linear = kind.codes(x, used, point.sae)
    assert encoder == PURSUIT or not torch.allclose(codes, linear, atol=1e-3), "the encoder is to make a difference"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if encoder == PURSUIT:
        raw = (x / 0.37) + mean
        contributions = codes * used.norms()
        torch.testing.assert_close(read_sae(tmp_path).encode(raw) * 0.37, contributions, atol=1e-4, rtol=1e-4)
        return
    with pytest.raises(UserError, match="load it by its id"):
        read_sae(tmp_path)


def test_matching_pursuit_as_saelens_has_it(tmp_path: Path) -> None:
    """Of one step a TopK that any version reads; of more, its own matching pursuit, by the loop that it has today."""
    x = batches(1)[0]
    for k in (1, 3):
        point = point_of(PURSUIT, "topk", sae=points(PENALTIES[:1], "topk", k=k)[0].sae)
        used = stack_of([point]).parameters(0)
        codes = architecture_of("topk").codes(x, used, point.sae, encoder=PURSUIT)
        contributions = codes * used.norms()
        files = saelens.to_files(point, used)
        config, tensors = json.loads(files[saelens.CONFIG]), load(files[saelens.WEIGHTS])
        if k == 1:
            for name, content in files.items():
                (tmp_path / name).write_bytes(content)
            torch.testing.assert_close(read_sae(tmp_path).encode(x), codes, atol=1e-5, rtol=1e-5)
            continue
        assert config["architecture"] == "matching_pursuit" and set(tensors) == {"W_dec", "b_dec"}
        assert (config["residual_threshold"], config["stop_on_duplicate_support"]) == (0.0, False)
        left, acts = x - tensors["b_dec"] * config["apply_b_dec_to_input"], torch.zeros(len(x), 40)
        for _ in range(config["max_iterations"]):
            values, indices = (left @ tensors["W_dec"].T).relu().max(dim=1, keepdim=True)
            acts.scatter_add_(1, indices, values)
            left = left - values * tensors["W_dec"][indices[:, 0]]
        torch.testing.assert_close(acts, contributions, atol=1e-5, rtol=1e-5)


def test_saelens_pursuit_ends_where_its_files_say() -> None:
    rows, x = torch.eye(3), torch.tensor([[3.0, 2.0, 0.1], [0.05, 0.0, 0.0]])
    tensors = {"W_dec": torch.cat([rows, torch.tensor([[0.8, 0.6, 0.0]])]), "b_dec": torch.zeros(3)}
    head = {"architecture": "matching_pursuit", "d_in": 3, "d_sae": 4}

    def codes(**config: object) -> Tensor:
        return saelens.read(to_bytes(tensors), {**head, **config}).encode(x)

    steps = torch.tensor([[0.12, 0.0, 0.1, 3.6], [0.05, 0, 0, 0]])
    one, two = torch.tensor([[0, 0, 0, 3.6], [0.05, 0, 0, 0]]), steps.clone()
    two[0, 2] = 0
    torch.testing.assert_close(codes(max_iterations=1), one)
    torch.testing.assert_close(codes(max_iterations=2, residual_threshold=0.0), two)
    torch.testing.assert_close(codes(max_iterations=3, residual_threshold=0.2), two)
    torch.testing.assert_close(codes(residual_threshold=0.0, stop_on_duplicate_support=True)[1], steps[1])
    for wrong, said in (("max_iterations", 0), ("residual_threshold", -1)):
        with pytest.raises(UserError, match=wrong):
            codes(**{wrong: said})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["encoder=mlp", "sae=tied"], "encoder=mlp goes with sae=.*, not with sae=tied"),
        (["encoder=ista", "sae=gated"], "encoder=ista goes with sae=.*, not with sae=gated"),
        (["encoder=matching_pursuit"], "encoder=matching_pursuit goes with sae=topk, not with sae=relu"),
        (["encoder=linear", "encoder.steps=3"], "encoder.steps is read by encoder=ista, lista alone"),
        (["encoder=mpl"], "did you mean 'mlp'"),
    ],
)
def test_wrong_pairs_are_refused_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        configured(words)
    assert "\n" not in str(refused.value)


def test_what_an_encoder_begins_as() -> None:
    x = batches(1)[0]
    linear, mlp = (point_of(encoder, "relu") for encoder in (Encoder(), MLP))
    begun = [architecture_of("relu").codes(x, start_of(p), p.sae, encoder=p.encoder) for p in (linear, mlp)]
    assert torch.equal(*begun)
    for encoder in (ISTA, LISTA):  # a step of 1/L lowers the error of codes without a threshold
        point = point_of(encoder, "relu")
        start = start_of(point).replace(b_dec=torch.zeros(16))
        sae = Stack.start([point], [start], "cpu").parameters(0)
        errors = [(codes @ sae.W_dec - x).square().sum() for codes in _after(x, sae, point, (1, 4, 40))]
        assert x.square().sum() > errors[0] > errors[1] > errors[2]


def _after(x: Tensor, sae: Parameters, point: Point, steps: tuple[int, ...]) -> list[Tensor]:
    kind = architecture_of(point.sae.architecture)
    return [kind.codes(x, sae, point.sae, encoder=point.encoder.replace(steps=n)) for n in steps]


def test_latents_that_an_init_leaves_off_stay_off() -> None:
    x = batches(1)[0]
    for encoder, architecture in [(ISTA, "relu"), (LISTA, "relu"), (PURSUIT, "topk")]:
        point = point_of(encoder, architecture)
        start = start_of(dataclasses.replace(point, encoder=Encoder()))
        start = start.replace(
            W_enc=start.W_enc.index_fill(0, torch.arange(5), 0), b_enc=start.b_enc.index_fill(0, torch.arange(5), -1)
        )
        begun = encoder_of(encoder.name).completed(start, point, torch.Generator())
        sae = Stack.start([point], [begun], "cpu").parameters(0)
        codes = architecture_of(architecture).codes(x, sae, point.sae, encoder=encoder)
        assert not codes[:, :5].any() and codes[:, 5:].any()


@pytest.mark.parametrize(("encoder", "architecture"), [(MLP, "relu"), (ISTA, "relu"), (PURSUIT, "topk")])
def test_a_revived_latent_reads_its_input(encoder: Encoder, architecture: str) -> None:
    point = point_of(encoder, architecture)
    point = dataclasses.replace(point, training=point.training.replace(revival="resample", revival_scale=1.0))
    stack, data = stack_of([point]), batches(2)
    rows = stack.named(stack.flat[0])
    if encoder == PURSUIT:
        rows["W_dec"][3] = 0  # never chosen
    elif encoder == ISTA:
        rows["b_enc"][3] = -1e3
    else:
        rows["b_enc"][3], rows["W_out"][3] = -1e3, 1.0
    stack.first += 1
    assert resample(stack, 0, data)[3]
    sae, kind = stack.parameters(0), architecture_of(architecture)
    codes = kind.codes(data.flatten(0, 1), sae, point.sae.replace(k=40), encoder=encoder.replace(steps=0))
    x, at = data.flatten(0, 1) - sae.b_dec, codes[:, 3].argmax()
    if encoder != PURSUIT:
        torch.testing.assert_close(codes[at, 3], sae.W_enc[3].norm() * x[at].norm(), rtol=1e-4, atol=1e-4)
    assert codes[at, 3] > 0
    for name in ("W_dec", *stack.encoder.rows):
        assert not stack.named(stack.first[0])[name][3].any() and stack.named(stack.first[0])[name].any()


def test_plans_know_what_trains_them_and_what_it_costs() -> None:
    cpu = SPEEDS["cpu"]
    linear = point_of(Encoder(), "relu")
    pursuit = dataclasses.replace(point_of(PURSUIT, "topk"), penalty=Penalty("none", 0.0))
    aux = dataclasses.replace(pursuit, training=pursuit.training.replace(revival="auxk"))
    assert [by_autograd(point, cpu) for point in (pursuit, aux, point_of(PURSUIT, "topk"))] == [False, True, True]
    assert by_autograd(pursuit, SPEEDS["cuda"])
    assert stack_key(pursuit) != stack_key(dataclasses.replace(pursuit, encoder=Encoder()))
    assert step_seconds(pursuit, cpu) < step_seconds(aux, cpu)
    for encoder in (MLP, ISTA, LISTA):
        point = dataclasses.replace(linear, encoder=encoder)
        assert not by_autograd(point, cpu) and by_autograd(point, SPEEDS["cuda"])
        assert by_autograd(dataclasses.replace(point, sae=point.sae.replace(architecture="jumprelu")), cpu)
        assert stack_key(point) != stack_key(linear) != stack_key(dataclasses.replace(linear, encoder=MLP))
        for l0 in (2, 20):  # by sums over what fires, and by products
            assert step_seconds(point, cpu, l0) > 1.3 * step_seconds(linear, cpu, l0)
    assert stack_key(dataclasses.replace(linear, encoder=ISTA)) != stack_key(
        dataclasses.replace(linear, encoder=Encoder("ista", steps=5))
    )


def test_an_encoder_is_part_of_an_identity_and_the_linear_one_is_not() -> None:
    plain = Point(penalty=Penalty("l1", 1.0))
    assert plain.id == dataclasses.replace(plain, encoder=Encoder("linear")).id
    assert len({dataclasses.replace(plain, encoder=each).id for each in (Encoder(), MLP, Encoder("mlp"), ISTA)}) == 4
    assert set(kinds("encoder")) == {"linear", "mlp", "ista", "lista", "matching_pursuit"}
