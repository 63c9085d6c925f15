"""The streamed suppression gradient against a slow, obviously right version that keeps graphs."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from builders import (
    Double,
    original,
    quick_spec,
    rehearsing,
    restricted,
    scratch_model,
    setting_of,
    trained_model,
)
from sophon._base.seeding import generator
from sophon._protection.losses import SUPPRESSIONS
from sophon._protection.protection import Protection
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.terms.rehearsal import (
    Rehearsal,
    RehearsalTerm,
    domain_of,
    gammas_of,
    sample_strategy,
)
from sophon._specs import Distil, FreshHead, Heal, NoiseKick, Preparation, RescaleWeights, Strategy
from sophon._training.setting import Setting


def _setting(model: nn.Module) -> Setting:
    return setting_of(model)


def _rehearsal(run: Protection) -> RehearsalTerm:
    (term,) = run.hinder
    assert isinstance(term, RehearsalTerm)
    return term


def _retained_graphs(
    model: nn.Module, pool: RehearsalTerm, strategy: Strategy
) -> dict[str, Tensor]:
    """Train a detached copy; keep every query graph on the real leaves; one backward."""
    feed = pool.feed(0, strategy)
    leaves = {n: p.detach().clone().requires_grad_(True) for n, p in model.named_parameters()}
    attacker = copy.deepcopy(model).train()
    velocity = {name: torch.zeros_like(p) for name, p in attacker.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    gammas = gammas_of(pool.spec.gamma, pool.spec.steps, 1)
    for step, gamma in enumerate(gammas):
        images, labels = feed.batch(step)
        size = strategy.batch_size
        loss = F.cross_entropy(attacker(images[:size]), labels[:size])
        gradients = torch.autograd.grad(loss, list(attacker.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(attacker.named_parameters(), gradients, strict=True):
                velocity[name] = strategy.momentum * velocity[name] + gradient
                p.sub_(velocity[name], alpha=strategy.learning_rate)
        moved = {
            name: leaves[name] + (p.detach() - leaves[name].detach())
            for name, p in attacker.named_parameters()
        }
        logits = functional_call(attacker, moved, (images[size:],))
        total = total + gamma * SUPPRESSIONS["klu"].function(logits, labels[size:]).mean()
    total.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("gamma", ["uniform", "linear", "last"])
def test_streamed_gradient_equals_retained_graphs_in_float64(gamma: str) -> None:
    model = Double(trained_model())
    strategy = Strategy(learning_rate=0.02, batch_size=16, steps=5)
    rehearsal = Rehearsal(steps=5, fixed=strategy, query_batch_size=8, gamma=gamma)
    pool = rehearsing(quick_spec(rehearsal=rehearsal), _setting(model), model)
    total, _ = pool.suppress(model)
    expected = _retained_graphs(model, pool, strategy)
    for name, value in expected.items():
        torch.testing.assert_close(total.gradients[name], value, rtol=1e-7, atol=1e-10)


PREPARATIONS: list[tuple[Preparation, ...]] = [
    (),
    (FreshHead(),),
    (RescaleWeights(norm=0.5),),
    (NoiseKick(relative_std=0.1),),
    (FreshHead(), RescaleWeights(norm=2.0)),
]


@pytest.mark.parametrize("preparations", PREPARATIONS)
def test_a_persistent_attacker_moves_by_factor_times_the_real_move(
    preparations: tuple[Preparation, ...],
) -> None:
    model = trained_model()
    strategy = Strategy(learning_rate=1e-2, batch_size=16, preparations=preparations)
    rehearsal = Rehearsal(steps=2, horizon=10, pool=1, fixed=strategy, query_batch_size=8)
    pool = rehearsing(quick_spec(rehearsal=rehearsal), _setting(model), model)
    pool.suppress(model)
    attacker = pool.pool[0]
    before = {name: p.detach().clone() for name, p in attacker.model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.125)
    attacker.follow(dict(model.named_parameters()))
    for name, p in attacker.model.named_parameters():
        expected = before[name] + attacker.origins[name].factor * 0.125
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-5)
    factors = {round(value, 6) for _, value in attacker.origins.values()}
    assert (0.0 in factors) == (FreshHead() in preparations)


@pytest.mark.parametrize(("horizon", "life"), [(None, 3), (12, 12)])
def test_a_schedule_runs_over_the_attackers_life(horizon: int | None, life: int) -> None:
    fixed = Strategy(schedule="cosine", batch_size=16, steps=200)
    rehearsal = Rehearsal(steps=3, horizon=horizon, pool=1, fixed=fixed, query_batch_size=8)
    sampled = rehearsal.model_copy(update={"fixed": None})
    model = trained_model()
    for one in (rehearsal, sampled):
        pool = rehearsing(quick_spec(rehearsal=one), _setting(model), model)
        assert pool.strategy(0).steps == life


def test_rescaling_passes_its_factor_on_to_the_gradient() -> None:
    """Scaled weights give the gradient of L(c * theta): c times the one at the scaled weights."""
    model = trained_model()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-12  # What is added to a variance does not scale with the weights.
    strategy = Strategy(
        optimizer="sgd",
        learning_rate=1e-30,
        batch_size=16,
        preparations=(RescaleWeights(norm=3.0),),
    )
    rehearsal = Rehearsal(steps=1, fixed=strategy, query_batch_size=64)
    pool = rehearsing(quick_spec(rehearsal=rehearsal), _setting(model), model)
    total, attackers = pool.suppress(model)
    factors = {n: o.factor for n, o in attackers[0].origins.items()}
    assert max(factors.values()) > 1.2
    plain = rehearsal.model_copy(update={"fixed": strategy.model_copy(update={"preparations": ()})})
    reference, _ = rehearsing(quick_spec(rehearsal=plain), _setting(model), model).suppress(model)
    # The function is preserved, so d L(c * theta) / d theta equals d L(theta) / d theta.
    for name, value in reference.gradients.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(total.gradients[name], value, rtol=1e-4, atol=1e-4 * scale)


def test_the_gradient_of_a_fresh_head_stays_out_unless_asked_for() -> None:
    model = trained_model()
    strategy = Strategy(batch_size=16, preparations=(FreshHead(),))
    setting = _setting(model)
    sums = {}
    for choice in ("exclude_fresh", "apply_fresh"):
        rehearsal = Rehearsal(steps=2, fixed=strategy, query_batch_size=8)
        spec = quick_spec(rehearsal=rehearsal, head_gradient=choice)
        total, _ = rehearsing(spec, setting, model).suppress(model)
        sums[choice] = float(total.gradients[setting.head + ".weight"].abs().sum())
        assert any(float(g.abs().sum()) > 0 for g in total.gradients.values())
    assert sums["exclude_fresh"] == 0
    assert sums["apply_fresh"] > 0


def test_suppress_leaves_the_real_model_alone() -> None:
    model = trained_model()
    before = copy.deepcopy(model.state_dict())
    pool = rehearsing(quick_spec(), _setting(model), model)
    for _ in range(4):
        pool.suppress(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_persistent_attackers_retire_at_their_horizon() -> None:
    model = scratch_model()
    pool = rehearsing(quick_spec(), _setting(model), model)
    for _ in range(12):
        _, attackers = pool.suppress(model)
        assert all(a.tuning.taken <= a.horizon <= 7 for a in attackers)
    assert pool.next_identity > 3


def test_sampled_strategies_stay_in_the_declared_distribution() -> None:
    distribution = StrategyDistribution(
        learning_rates={"adam": (1e-4, 1e-2), "sgd": (1e-3, 1.0)}, batch_sizes=(8, 16)
    )
    drawn = [sample_strategy(distribution, generator(0, "s", i)) for i in range(300)]
    for strategy in drawn:
        low, high = distribution.learning_rates[strategy.optimizer]
        assert low <= strategy.learning_rate <= high
    assert {s.batch_size for s in drawn} == {8, 16}
    adam = sorted(s.learning_rate for s in drawn if s.optimizer == "adam")
    # Log-uniform: the median is the geometric mean of the ends.
    assert adam[len(adam) // 2] == pytest.approx(1e-3, rel=0.5)


def test_domains_take_turns_by_weight() -> None:
    weights = [1.0, 3.0, 2.0]
    taken = [domain_of(identity, weights) for identity in range(60)]
    for count in (6, 12, 60):
        held = [taken[:count].count(k) / count for k in range(3)]
        assert held == pytest.approx([1 / 6, 1 / 2, 1 / 3])


@pytest.mark.parametrize(
    ("kind", "steps", "strategies"),
    list(itertools.product(["uniform", "linear", "last"], [1, 7], [1, 3])),
)
def test_gammas_sum_to_one_over_the_strategies(kind: str, steps: int, strategies: int) -> None:
    gammas = gammas_of(kind, steps, strategies)
    assert len(gammas) == steps
    assert sum(gammas) == pytest.approx(1 / strategies)


class _Saved:
    """What a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _most_kept(steps: int) -> int:
    model = trained_model()
    spec = quick_spec(rehearsal=Rehearsal(steps=steps, query_batch_size=8))
    pool = rehearsing(spec, _setting(model), model)
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()
    most = 0

    def keep(tensor: Tensor) -> _Saved:
        nonlocal most
        saved = _Saved(tensor)
        kept.add(saved)
        most = max(most, len(kept))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        pool.suppress(model)
    return most


def test_what_is_kept_does_not_grow_with_k() -> None:
    assert 0 < _most_kept(2) == _most_kept(12)


def test_queries_run_in_the_precision_of_their_attacker() -> None:
    model = trained_model()
    fixed = Strategy(batch_size=16, precision="bf16")
    spec = quick_spec(rehearsal=Rehearsal(steps=1, query_batch_size=8, fixed=fixed))
    pool = rehearsing(spec, _setting(model), model)
    (attacker,) = pool.suppress(model)[1]
    met = []
    attacker.model.register_forward_hook(lambda *args: met.append(args[2].dtype))
    pool._query(attacker)
    assert met == [torch.bfloat16]


@pytest.mark.parametrize("gamma", ["uniform", "last"])
def test_attackers_that_heal_first_still_have_steps_of_their_own(gamma: str) -> None:
    spec = quick_spec(
        rehearsal=Rehearsal(
            steps=5,
            horizon=20,
            pool=8,
            query_batch_size=16,
            gamma=gamma,  # type: ignore[arg-type]
            fixed=Strategy(preparations=(Heal(share=0.5),), batch_size=16),
        )
    )
    run = Protection(trained_model(), original=original(), restricted=restricted(), spec=spec)
    for _ in range(8):
        total, (attacker,) = _rehearsal(run).suppress(run.model)
        assert attacker.tuning.taken > 10
        assert float(total.loss) > 0
    lives = {a.horizon for a in _rehearsal(run).pool.values()}
    assert min(lives) >= 15
    assert len(lives) > 1


def test_an_attacker_that_distils_first_passes_no_gradient_on() -> None:
    strategy = Strategy(preparations=(Distil(share=0.5),), batch_size=16)
    rehearsal = Rehearsal(steps=4, query_batch_size=16, fixed=strategy)
    model = trained_model()
    pool = rehearsing(quick_spec(rehearsal=rehearsal), _setting(model), model)
    total, _ = pool.suppress(model)
    assert float(total.loss) > 0
    assert not any(bool(gradient.any()) for gradient in total.gradients.values())


def test_the_first_generation_ends_staggered() -> None:
    spec = quick_spec(
        rehearsal=Rehearsal(
            steps=2, horizon=16, pool=4, query_batch_size=16, fixed=Strategy(batch_size=16)
        )
    )
    run = Protection(trained_model(), original=original(), restricted=restricted(), spec=spec)
    for _ in range(4):
        _rehearsal(run).suppress(run.model)
    assert [_rehearsal(run).pool[slot].horizon for slot in range(4)] == [4, 8, 12, 16]


def test_the_query_score_is_a_plain_mean_over_attackers_and_steps() -> None:
    spec = quick_spec(
        rehearsal=Rehearsal(
            strategies=2, steps=3, query_batch_size=16, fixed=Strategy(batch_size=16)
        )
    )
    run = Protection(trained_model(), original=original(), restricted=restricted(), spec=spec)
    scores: list[float] = []
    counted = run.setting.task.score

    def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        held = counted(outputs, targets)
        scores.append(float(held.mean()))
        return held

    run.setting.task.score = score  # type: ignore[method-assign]
    total, attackers = _rehearsal(run).suppress(run.model)
    assert (len(attackers), len(scores)) == (2, 6)
    assert float(total.score) == pytest.approx(sum(scores) / 6)
