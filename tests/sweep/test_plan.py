"""The plan: what is left, what stacks with what, which shard, at what cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_sweep.config import overrides as config
from sae_sweep.config.grid import Sweep
from sae_sweep.config.settings import Evaluation, Penalty, Point, Sae, Toy, Training, canonical, toy_id
from sae_sweep.errors import UserError
from sae_sweep.registry import get, kinds, offered
from sae_sweep.sweep import cost
from sae_sweep.sweep import plan as plan_module
from sae_sweep.sweep.cost import activation_size, state_bytes, step_seconds, training_bytes
from sae_sweep.sweep.hardware_profile import SPEEDS, XEON
from sae_sweep.sweep.plan import LARGEST_PACK, plan, stack_key, stacks

ARCHITECTURES = tuple(kinds("architecture"))
INITS = offered("init")

CPU = ["toy=small", "device=cpu"]


def sweep_of(*overrides: str) -> Sweep:
    return config.load([*CPU, *overrides])


def test_points_of_equal_shape_and_data_share_a_pack_whatever_their_penalty() -> None:
    sweep = sweep_of("penalty=l1,sqrt,tanh", "seed=0,1", "training.lr=0.1,0.2", "sae.init=kmeans,oracle")
    assert [len(pack) for pack in plan(sweep, set()).packs] == [48, 48]
    assert [len(pack) for pack in plan(sweep_of("penalty=l1,sqrt", "sae.width=16,32"), set()).packs] == [8, 8]


@pytest.mark.parametrize(
    "override",
    [
        "toy.seed=0,1",
        "site=pre_unembed,post_unembed",
        "distribution=uniform,max_stratified",
        "data_seed=0,1",
        "sae=topk,batchtopk",
        "sae.width=8,16",
        "training.steps=10,20",
        "training.batch_size=64,128",
    ],
)
def test_what_tells_stacks_apart(override: str) -> None:
    packs = plan(sweep_of(override, "penalty.coefficient=1"), set()).packs
    assert [len(pack) for pack in packs] == [1, 1]
    assert stack_key(packs[0][0]) != stack_key(packs[1][0])


def test_k_tells_counted_architectures_apart() -> None:
    assert len(plan(sweep_of("sae=topk", "sae.k=1,2"), set()).packs) == 2


def test_packs_hold_every_missing_point_once_in_grid_order() -> None:
    sweep = sweep_of("sae.width=8,4", "seed=range(0,100)", "penalty.coefficient=1")
    whole = plan(sweep, set())
    assert [point for pack in whole.packs for point in pack] == sweep.points == whole.points
    assert [len(pack) for pack in whole.packs] == [50, 50, 50, 50]
    finished = {point.id for point in sweep.points[:95]}
    rest = plan(sweep, finished)
    assert rest.finished == sweep.points[:95]
    assert [point for pack in rest.packs for point in pack] == sweep.points[95:]
    assert rest.points == sweep.points


def test_memory_bounds_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of("seed=range(0,10)", "penalty.coefficient=1")
    monkeypatch.setattr(plan_module, "cores", lambda device: 2)
    speed, point = SPEEDS["cpu"], sweep.points[0]
    one, shared = cost.state_bytes(point, "cpu"), cost.training_bytes(point, 2, speed)
    for room, sizes in ((3 * one, [3, 3, 3, 1]), (5 * one, [5, 5]), (one - 1, [1] * 10)):
        monkeypatch.setitem(SPEEDS, "cpu", replace(speed, pack_bytes=shared + room))
        bounded = plan(sweep, set())
        assert [len(pack) for pack in bounded.packs] == sizes
        assert bounded.peak_memory_bytes == speed.base_bytes + cost.work_bytes(point, 2, speed) + max(sizes) * one
    parameters = 2 * 16 * 32 + 16 + 32
    assert one == 4 * 3 * parameters  # float32: themselves and Adam's moments


def test_memory_is_that_of_the_stage_that_takes_most(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = SPEEDS["cpu"]

    def held(**sae: Any) -> int:
        return cost.work_bytes(Point(sae=Sae(**{"init": "oracle", **sae}), training=Training(steps=1)), 1, speed)

    # k-means: a distance from each of 8 exemplars a latent to each centre; a random start: 45% of the latents fire.
    assert held(width=8192, init="kmeans") - held(width=8192) > 0.9 * 4 * 8 * 8192**2
    assert held(width=8192, init="random") - held(width=8192) > 0.9 * cost.MEASURED_BYTES * 1024 * 0.45 * 8192
    # Every input of a small toy is kept: 16³ activations of 32 numbers.
    small = Point(toy=Toy(d_vocab=16, k=3))
    kept = cost.work_bytes(small, 1, speed)
    monkeypatch.setattr(cost, "TABLE_INPUTS", 0)
    assert kept - cost.work_bytes(small, 1, speed) == 4 * 16**3 * 32


def test_a_step_costs_its_product_its_entries_and_its_parameters() -> None:
    speed = XEON

    def seconds(width: int, l0: float, **training: int) -> float:
        point = Point(toy=Toy(d_model=64), sae=Sae(width=width), training=Training().replace(**training))
        return cost.step_seconds(point, speed, l0)

    # Seen on one core.
    assert seconds(136, 4, batch_size=4096) == pytest.approx(2.02e-3, rel=0.3)
    assert seconds(4096, 16, batch_size=512) == pytest.approx(3.47e-3, rel=0.3)
    # The product takes over as SAEs grow wide, Adam where batches are small, entries where many fire.
    assert seconds(1 << 17, 8, batch_size=4096) == pytest.approx(2 * seconds(1 << 16, 8, batch_size=4096), rel=0.05)
    assert seconds(1 << 16, 8, batch_size=1) > 0.9 * speed.parameter * 2 * 64 * (1 << 16)
    assert seconds(1024, 100) - seconds(1024, 75) == pytest.approx(seconds(1024, 75) - seconds(1024, 50))
    # Where few fire the product is of rounded rows, if the processor has it.
    assert seconds(4096, cost.ROUND_BELOW * 4095) <= seconds(4096, cost.ROUND_BELOW * 4096)


def test_what_the_planner_repeats_of_what_it_plans_is_so() -> None:
    from sae_sweep.kernels.cpu import sparse_step as sparse
    from sae_sweep.kernels.cpu.architecture_steps import steps_of
    from sae_sweep.kernels.cpu.narrow import is_narrow
    from sae_sweep.metrics import information

    assert cost.LISTED_BYTES == 4 * (sparse.LISTED + sparse.OWN + 1)
    assert {name for name in ARCHITECTURES if steps_of(name).dense} == set(cost.DENSE)
    assert 2 * len(information.FACTOR) == cost.NULLS
    for name in ARCHITECTURES:
        for width, k in ((1280, 8), (1281, 8), (1280, 9)):
            for penalty in ("l1", "exclusive_pi"):
                point = Point(sae=Sae(name, width=width, k=k), penalty=Penalty(penalty))
                alone = SimpleNamespace(architecture=get("architecture", name), points=[point], width=width)
                assert cost._narrow(point, XEON) == is_narrow(alone, 0)
    assert set(cost.USUAL) == set(INITS)


def test_the_parts_of_a_pack_sum_and_each_grows_with_its_own_work() -> None:
    speed, evaluation = SPEEDS["cpu"], Evaluation()
    point = Point(toy=Toy(d_vocab=16, k=3), sae=Sae(width=136))

    def parts(point: Point = point, count: int = 1, **asked: Any) -> dict[str, float]:
        pack = tuple(replace(point, seed=seed) for seed in range(count))
        found = cost.pack_parts(pack, evaluation.replace(**asked), speed, 1)
        assert cost.pack_seconds(pack, evaluation.replace(**asked), speed, 1) == pytest.approx(sum(found.values()))
        return found

    def more(than: dict[str, float], now: dict[str, float]) -> set[str]:
        assert all(now[name] >= than[name] for name in than)
        return {name for name in than if now[name] > than[name]}

    base = parts()
    assert set(base) == {"starts", "training", "measuring", "storing"}
    assert more(base, parts(count=2)) == set(base)
    assert more(base, parts(replace(point, training=Training(steps=4000)))) == {"training"}
    assert more(parts(replace(point, sae=Sae(width=136, init="exemplars"))), base) == {"starts"}
    names = ("probing", "priors", "structure", "order", "inference")
    for asked in (*({name: True} for name in names), {"permutations": 40}):
        assert more(base, parts(**asked)) == {"measuring"}
    # What is drawn by the toy itself has no end: more of it is measured, and it is computed anew for every batch.
    assert more(base, parts(replace(point, toy=Toy(d_vocab=64, k=4)))) == {"starts", "training", "measuring"}


@given(st.floats(1e-4, 2.0), st.integers(1, 5000), st.floats(0, 1), st.floats(1e-5, 0.1))
def test_adam_has_moved_so_far_after_so_many_steps(moved: float, steps: int, warmup: float, lr: float) -> None:
    training = Training(steps=steps, lr=lr, lr_warmup=warmup)
    found = cost.steps_until(moved, training)
    assert 0 < found <= steps
    rates = [lr * min(1.0, (step + 1) / max(1.0, warmup * steps)) for step in range(steps)]
    if found < steps:
        # Whole steps on one side, an integral on the other.
        assert sum(rates[: int(found)]) == pytest.approx(moved, abs=2 * lr)
    else:
        assert sum(rates) <= moved + 2 * lr


def test_every_step_of_training_is_in_one_phase() -> None:
    for init in INITS:
        for architecture in ("relu", "topk"):
            for steps in (1, 100, 5000):
                sae = Sae(architecture, width=1024, k=4, init=init)
                phases = list(cost.firing(Point(sae=sae, training=Training(steps=steps))))
                assert sum(count for count, _ in phases) == pytest.approx(steps)
                assert all(count >= 0 and 0 < l0 <= 1024 for count, l0 in phases)


def test_cores_share_a_pack_and_no_more_than_it_has_to_share() -> None:
    speed, settings = SPEEDS["cpu"], Training(steps=1000, batch_size=64)
    narrow, wide = (Point(sae=Sae(width=width, init="oracle"), training=settings) for width in (256, 1 << 20))

    def seconds(point: Point, count: int, workers: int) -> float:
        parts = cost.pack_parts((point,) * count, Evaluation(inputs=16), speed, workers)
        return parts["training"] + parts["measuring"]

    assert seconds(narrow, 1, 8) == seconds(narrow, 1, 1)
    assert seconds(narrow, 8, 8) < 0.3 * seconds(narrow, 8, 1)
    assert seconds(wide, 1, 2) < 0.8 * seconds(wide, 1, 1)  # measuring one SAE is not shared


def test_a_random_start_costs_its_dense_steps() -> None:
    random, exemplars = (Point(sae=Sae(width=512, init=init)) for init in ("random", "exemplars"))
    counted = replace(random, sae=random.sae.replace(architecture="topk"))
    seconds = [cost.pack_seconds((p,), Evaluation(), SPEEDS["cpu"], 1) for p in (random, exemplars, counted)]
    assert seconds[0] > seconds[1] > seconds[2]


def test_logging_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    logged, silent = (plan(sweep_of("seed=0,1", f"logger={name}"), set()).seconds for name in ("wandb", "none"))
    points = len(sweep_of("seed=0,1").points)
    assert logged - silent == pytest.approx(points * SPEEDS["cpu"].logged / cost.cores("cpu"))


@given(st.integers(1, 7), st.integers(0, 30))
def test_shards_partition_the_grid_and_do_not_drift(count: int, done: int) -> None:
    sweep = SHARDED
    shards = [plan(sweep, set(), (index, count)) for index in range(count)]
    ids = [point.id for shard in shards for point in shard.points]
    assert sorted(ids) == sorted(point.id for point in sweep.points)
    finished = {point.id for point in sweep.points[:done]}
    for index, shard in enumerate(shards):
        assert all(int(point.id, 16) % count == index for point in shard.points)
        later = plan(sweep, finished, (index, count))
        assert later.points == shard.points
        assert {point.id for pack in later.packs for point in pack} == {p.id for p in shard.points} - finished


SHARDED = sweep_of("seed=range(0,30)", "penalty.coefficient=1")


def test_no_such_shard() -> None:
    for shard in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(UserError, match="no shard"):
            plan(SHARDED, set(), shard)


def test_the_estimate_grows_with_the_work_and_shrinks_with_what_is_done() -> None:
    def seconds(*overrides: str, finished: set[str] | None = None, toys: set[str] | None = None) -> float:
        return plan(
            sweep_of("penalty.coefficient=1", *overrides), finished or set(), trained_toys=toys or set()
        ).seconds

    base = seconds()
    assert base > 0
    for more in ("training.steps=100000", "sae.width=4096", "seed=0,1", "toy.seed=0,1", "toy.steps=99999"):
        assert seconds(more) > base
    point = sweep_of("penalty.coefficient=1").points[0]
    assert seconds(finished={point.id}) == 0
    assert 0 < seconds(toys={toy_id(point.toy)}) < base
    # Sizes beyond any machine are still only numbers.
    assert seconds("toy.k=9000000000000000", "sae.width=9000000000000000") > 1e20


def test_the_report() -> None:
    sweep = sweep_of("seed=0,1,2", "penalty.coefficient=1", "name=three")
    report = plan(sweep, {sweep.points[0].id}).to_json(sweep)
    estimate = report.pop("estimate")
    assert report == {"schema": 1, "sweep": "three", "points": 3, "finished": 1, "packs": 1}
    assert set(estimate) == {"seconds", "peak_memory_bytes"}
    nothing = plan(sweep, {point.id for point in sweep.points})
    assert nothing.packs == []
    assert (nothing.seconds, nothing.peak_memory_bytes) == (0, 0)


def test_the_size_of_an_activation() -> None:
    point = Point(toy=Toy(d_vocab=16, d_model=32))
    assert activation_size(point) == 32
    assert activation_size(replace(point, site=point.site.replace(name="post_unembed"))) == 16


def test_a_stack_takes_no_more_than_it_can_share() -> None:
    points = [canonical(Point(sae=Sae(width=4), penalty=Penalty(coefficient=c))) for c in range(1, 131)]
    sweep = replace(SHARDED, points=points, output_dir=Path("x"))
    assert [len(pack) for pack in plan(sweep, set()).packs] == [44, 44, 42]
    assert max(len(pack) for pack in plan(sweep, set()).packs) <= LARGEST_PACK


def test_autograd_is_counted_by_batch_and_width() -> None:
    """What holds batch × width for each SAE at work says so, and gets smaller packs for it: on a GPU alone."""
    relu, gated = (Point(sae=Sae(name, width=8192), training=Training(batch_size=4096)) for name in ("relu", "gated"))
    weighed, held = replace(relu, penalty=Penalty("exclusive_pi")), 4 * 4096 * 8192
    assert state_bytes(gated, "cpu") - state_bytes(relu, "cpu") == 4 * 3 * 2 * 8192
    for other in (gated, weighed):
        assert training_bytes(other, 2, SPEEDS["cpu"]) - training_bytes(relu, 2, SPEEDS["cpu"]) < held
        assert training_bytes(other, 1, SPEEDS["cuda"]) - training_bytes(relu, 1, SPEEDS["cuda"]) > 10 * held
        assert step_seconds(other, SPEEDS["cuda"]) > 2 * step_seconds(relu, SPEEDS["cuda"])
    pair = Point(penalty=Penalty("exclusive_pi", 1.0)), Point(penalty=Penalty("l1", 1.0))
    assert len(stacks(pair)) == 2  # a backend of its own must not decide about pack-mates
