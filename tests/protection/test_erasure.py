"""Erasure: readers against ridges written out, hostile features, and what training does."""

from __future__ import annotations

import dataclasses
import re
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from builders import digits, original, restricted, setting_of, trained_model
from plain_ridge import ORACLES, plain_r2, plain_standardised
from sophon._base.errors import DataError, NonFiniteError, SpecError, UnsupportedModelError
from sophon._base.seeding import generator
from sophon._cli.progress import round_text
from sophon._data import Domain, Images
from sophon._models import weights_sha256
from sophon._protection.protection import Protection
from sophon._protection.readers import (
    KERNELS,
    ReaderKind,
    Readers,
    ReadersSpec,
    explained,
    pooled,
    pooled_to,
    read_kernels,
    standardised,
)
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.spec import ProtectSpec
from sophon._protection.term import Surroundings
from sophon._protection.terms.erasure import ErasureSpec, ErasureTerm
from sophon._protection.terms.rehearsal import Rehearsal, RehearsalTerm
from sophon._protection.update import Turn
from sophon._specs import Guard
from sophon._training.ranks import Ranks

KINDS = tuple(KERNELS)
ONE = ReadersSpec(networks=1)


def _features(images: int, width: int, seed: int = 0) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(images, width, generator=stream, dtype=torch.float64)


def _labels(images: int, classes: int) -> Tensor:
    return torch.arange(images) * 7 % classes


def _score(features: Tensor, labels: Tensor, classes: int, kind: Any, penalty: float) -> Tensor:
    kernels = read_kernels(features, (kind,))
    targets = nn.functional.one_hot(labels, classes)
    return explained(kernels, targets, torch.tensor([penalty]))[0]


def test_every_reader_has_a_name_and_an_oracle() -> None:
    assert set(ORACLES) == set(KERNELS) == set(get_args(ReaderKind))
    assert set(ReadersSpec().kinds) <= set(KERNELS)


# --- Against the formula ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("images", "width"), [(24, 5), (24, 60)])
def test_scores_and_gradients_are_those_of_a_ridge_written_out(
    kind: Any, images: int, width: int
) -> None:
    features = _features(images, width).requires_grad_(True)
    labels = _labels(images, 4)
    found = _score(standardised(features, 2.0), labels, 4, kind, 0.02)
    expected = plain_r2(plain_standardised(features, 2.0), labels, 4, kind, 0.02)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(found, features)
    (wanted,) = torch.autograd.grad(expected, features)
    assert float(wanted.abs().max()) > 1e-4
    most = float(wanted.abs().max())
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * most)


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_tell_are_found_and_noise_is_not(kind: Any) -> None:
    labels = torch.randint(4, (400,), generator=torch.Generator().manual_seed(1))
    told = torch.eye(4, dtype=torch.float64)[labels] + 0.05 * _features(400, 4)
    assert float(_score(standardised(told, 3.0), labels, 4, kind, 1e-3)) > 0.9
    noise = standardised(_features(400, 4, seed=2), 3.0)
    assert float(_score(noise, labels, 4, kind, 0.03)) < 0.05


def test_maps_and_tokens_are_pooled_to_positions() -> None:
    maps = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    expected = torch.stack(
        [maps[..., y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2)], 2
    )
    assert torch.equal(pooled(maps, 2).flatten(1), expected.flatten(1))
    assert pooled(maps, 9).shape == (2, 3, 4, 4)
    tokens = torch.arange(2 * 8 * 3, dtype=torch.float32).view(2, 8, 3)
    pairs = torch.stack([tokens[:, i : i + 2].mean(1) for i in range(0, 8, 2)], 2)
    assert torch.equal(pooled(tokens, 2).flatten(1), pairs.flatten(1))
    assert torch.equal(pooled(tokens[:, 0], 2), tokens[:, 0])


@pytest.mark.parametrize("views", [(2, 4), (1, 4, 2), (3, 4), (5, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_views_of_maps_are_averages_and_so_are_their_gradients(
    views: tuple[int, ...], last: bool
) -> None:
    maps = _features(2, 3 * 8 * 8).view(2, 3, 8, 8).float()
    maps = maps.contiguous(memory_format=torch.channels_last) if last else maps
    plain, read = maps.clone().requires_grad_(True), maps.clone().requires_grad_(True)
    wanted = [nn.functional.adaptive_avg_pool2d(plain, view).flatten(1) for view in views]
    found = pooled_to(read, views)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.cat([values.square().sum(1) for values in wanted]).sum().backward()
    torch.cat([values.square().sum(1) for values in found]).sum().backward()
    assert plain.grad is not None
    assert read.grad is not None
    torch.testing.assert_close(read.grad, plain.grad)


# --- What cannot fool it --------------------------------------------------------------------------


def _scores(maps: Tensor, labels: Tensor) -> list[float]:
    return [
        float(_score(standardised(pooled(maps, view).flatten(1), 3.0), labels, 4, kind, 0.01))
        for view in (1, 2)
        for kind in ("linear", "kernel")
    ]


@settings(max_examples=25, deadline=None)
@given(
    powers=st.lists(st.floats(-0.75, 0.75), min_size=6, max_size=6),
    shifts=st.lists(st.floats(-3.0, 3.0), min_size=6, max_size=6),
    order=st.permutations(range(6)),
)
def test_rescaled_shifted_and_permuted_channels_score_the_same(
    powers: list[float], shifts: list[float], order: list[int]
) -> None:
    stream = torch.Generator().manual_seed(3)
    maps = torch.randn(40, 6, 4, 4, generator=stream)
    labels = _labels(40, 4)
    maps[:, 0] += labels[:, None, None]
    factors = 10.0 ** torch.tensor(powers).view(1, 6, 1, 1)
    changed = (maps + torch.tensor(shifts).view(1, 6, 1, 1)) * factors
    assert _scores(changed[:, order], labels) == pytest.approx(_scores(maps, labels), abs=0.01)


# --- Hostile features -----------------------------------------------------------------------------


HOSTILE: dict[str, tuple[Tensor, Tensor, int]] = {
    "rank one": (_features(24, 1) @ _features(1, 30), _labels(24, 4), 4),
    "constant": (torch.full((24, 6), 3.0), _labels(24, 4), 4),
    "zero": (torch.zeros(24, 6), _labels(24, 4), 4),
    "one alive": (torch.cat([torch.zeros(24, 5), _features(24, 1)], 1), _labels(24, 4), 4),
    "huge": (1e15 * _features(24, 6), _labels(24, 4), 4),
    "tiny": (1e-15 * _features(24, 6), _labels(24, 4), 4),
    "two images": (_features(2, 6), _labels(2, 2), 2),
    "eight images": (_features(8, 300), _labels(8, 4), 4),
    "all one class in the query": (_features(24, 6), (torch.arange(24) < 12).long() * 2, 4),
    "a class missing in the support": (_features(24, 6), (torch.arange(24) >= 12).long(), 2),
    "a class missing in the query": (_features(24, 6), (torch.arange(24) == 0).long(), 2),
    "one class everywhere": (_features(24, 6), torch.zeros(24).long(), 2),
    "a thousand classes": (_features(64, 40), torch.arange(64) * 15, 1000),
    "copies of one image": (_features(1, 6).repeat(24, 1), _labels(24, 4), 4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(HOSTILE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_and_gradients_are_finite(name: str, kind: Any, dtype: torch.dtype) -> None:
    values, labels, classes = HOSTILE[name]
    features = values.to(dtype).requires_grad_(True)
    score = _score(standardised(features, 3.0), labels, classes, kind, 3e-4)
    (gradient,) = torch.autograd.grad(score, features)
    assert bool(score.isfinite())
    assert bool(gradient.isfinite().all())
    assert float(score.detach()) <= 1 + 1e-3


# --- The term on a network ------------------------------------------------------------------------


def _around(model: nn.Module | None = None, **changes: Any) -> Surroundings:
    held = model or trained_model()
    return Surroundings(setting_of(held, **changes), held, 0)


def _term(around: Surroundings | None = None, **changes: Any) -> ErasureTerm:
    spec = ErasureSpec(**{"batch_size": 32, "readers": ONE, **changes})
    return ErasureTerm(spec, around or _around())


def test_running_statistics_and_modes_are_as_they_were_after_a_contribution() -> None:
    model = trained_model()
    model.stage2.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: part.training for name, part in model.named_modules()}
    term = _term()
    given_before = weights_sha256(term.around.given)
    for _ in range(2):
        term.contribute(model)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(getattr(part, "track_running_stats", True) for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert weights_sha256(term.around.given) == given_before


def test_a_contribution_that_fails_leaves_them_so_too() -> None:
    model, term = trained_model(), _term()
    with torch.no_grad():
        model.stage2[0].weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        term.contribute(model)
    assert not model.training
    assert all(getattr(part, "track_running_stats", True) for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_features_that_are_not_finite_name_the_depth() -> None:
    model, term = trained_model(), _term()
    with torch.no_grad():
        model.stage2[0].weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"features at 'stage2\.0'.*lower the rate of protect"):
        term.contribute(model)


def test_depths_that_there_are_not_list_those_that_there_are() -> None:
    term = _term()
    names = list(term.readers.depths)
    assert names == ["stage1.0", "stage1.3", "stage2.0", "stage2.3", "stage3.0", "stage3.3"]
    with pytest.raises(SpecError, match=r"no block 'stage9'; there is stage1\.0, .*stage3\.3"):
        _term(readers=ReadersSpec(networks=1, depths=("stage1.0", "stage9")))
    chosen = _term(readers=ReadersSpec(networks=1, depths=("stage3.0", "stage1.0")))
    assert list(chosen.readers.depths) == ["stage3.0", "stage1.0"]


def test_a_network_without_blocks_is_refused() -> None:
    alone = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
    with pytest.raises(UnsupportedModelError, match=r"no blocks before its head '1'"):
        _term(_around(alone))


def test_several_domains_take_turns_by_weight() -> None:
    light = dataclasses.replace(digits(5, 8), weight=1.0)
    heavy = dataclasses.replace(digits(8, 10), weight=3.0)
    term = _term(_around(restricted=(light, heavy)))
    model = trained_model()
    met = [term.contribute(model).domains[0] for _ in range(8)]
    assert (met.count(light.name), met.count(heavy.name)) == (2, 6)
    assert term.taken == [2, 6]
    assert set(term.readers.floors) == {light.name, heavy.name}
    # Every turn of a domain is another batch, also after it was interrupted.
    again = _term(_around(restricted=(light, heavy)))
    again.restore(model, *term.state())
    first, second = term.contribute(model), again.contribute(model)
    assert all(torch.equal(g, second.gradients[name]) for name, g in first.gradients.items())


def test_floors_are_what_fresh_networks_show() -> None:
    around = _around()
    spec = ReadersSpec(networks=3)
    readers = Readers(spec, around, 64)
    (floors,) = readers.floors.values()
    # Whatever the given weights are, but for what no reset reaches.
    other = trained_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    moved = Readers(spec, dataclasses.replace(around, given=other, shared={}), 64)
    for mine, theirs in zip(floors, moved.floors[restricted().name], strict=True):
        assert torch.equal(mine, theirs)
    # A mean over networks of their tables, none below zero, by the readers' order.
    assert all(len(row) == len(spec.views) * len(spec.kinds) for row in floors)
    assert all(bool((row >= 0).all()) for row in floors)
    # The network that was trained, on digits too, shows more than fresh ones.
    given = [float(row.max()) for row in readers.table(around.given, restricted())]
    assert given[-1] > float(floors[-1].max())


def test_floors_are_means_over_unlike_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[list[Tensor]] = []
    table = Readers.table

    def noted(readers: Readers, *asked: Any) -> list[Tensor]:
        tables.append(table(readers, *asked))
        return tables[-1]

    monkeypatch.setattr(Readers, "table", noted)
    (floors,) = Readers(ReadersSpec(networks=3), _around(), 32).floors.values()
    assert len(tables) == 3
    whole = [torch.cat(rows) for rows in tables]
    assert all(not torch.equal(one, other) for one, other in combinations(whole, 2))
    torch.testing.assert_close(torch.cat(floors), (sum(whole) / 3).clamp_min(0))


def test_terms_that_read_alike_ask_the_fresh_networks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    around, asked = _around(), []
    floor = Readers._floor
    monkeypatch.setattr(Readers, "_floor", lambda *given: asked.append(1) or floor(*given))
    first, second = (Readers(ONE, around, 32) for _ in range(2))
    assert not asked
    assert first.floors is second.floors
    assert len(asked) == 1
    assert Readers(ONE, around, 48).floors
    assert Readers(ReadersSpec(networks=2), around, 32).floors
    assert len(asked) == 3


def test_what_is_read_early_comes_from_the_first_blocks() -> None:
    """Depths draw their ridges in turn: those of the first do not depend on the second."""
    both, first = (
        _term(readers=ReadersSpec(networks=1, depths=depths)).contribute(trained_model()).readings
        for depths in (("stage1.0", "stage3.3"), ("stage1.0",))
    )
    assert set(first) == {"erasure", "R2 early", "floor early"}
    assert set(both) == {*first, "R2 middle", "floor middle"}
    for name in ("R2 early", "floor early"):
        assert float(both[name]) == pytest.approx(float(first[name]), abs=1e-6)
    assert float(both["R2 middle"]) != pytest.approx(float(first["R2 early"]), abs=1e-3)


def test_floors_are_of_images_augmented_as_the_terms() -> None:
    around = _around()
    plain, moved = (_term(around, augmentation=how) for how in ("none", "crop"))
    attacked = RehearsalTerm(
        Rehearsal(
            query_batch_size=32,
            readers=ONE,
            distribution=StrategyDistribution(augmentation="crop"),
        ),
        around,
    )
    assert attacked.readers is not None
    assert attacked.readers.floors is moved.readers.floors
    (first,), (second,) = plain.readers.floors.values(), moved.readers.floors.values()
    assert not all(map(torch.equal, first, second))


def test_the_erasure_of_scores_below_the_floor_is_nothing() -> None:
    term = _term()
    for rows in term.readers.floors.values():
        rows[:] = [torch.ones_like(row) for row in rows]
    given = term.contribute(trained_model())
    assert float(given.loss) == 0
    assert not any(bool(gradient.any()) for gradient in given.gradients.values())


def test_the_loss_is_the_best_reader_of_every_depth_above_its_floor() -> None:
    term, model = _term(), trained_model()
    images, labels = term.feeds[0].batch(0)
    readers = term.readers
    with torch.no_grad(), readers.watching(model) as outputs:
        model(images)
    rows = readers.scores(outputs, labels, 5, generator(0, "erasure", 0))
    floors = readers.floors[restricted().name]
    by_hand = [max(0.0, *((row - floor).tolist())) for row, floor in zip(rows, floors, strict=True)]
    found = term.contribute(model)
    assert float(found.loss) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert float(found.score) == pytest.approx(
        sum(float(row.max()) for row in rows) / len(rows), rel=1e-5
    )


# --- Refusals -------------------------------------------------------------------------------------


def _refused(restricted_domain: Domain, out: Path, **erasure: Any) -> None:
    Protection(
        trained_model(),
        original=original(),
        restricted=restricted_domain,
        spec=ProtectSpec(hinder=(ErasureSpec(**erasure),)),
        out=out,
    )


def test_too_few_images_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fewer than protect\.hinder: erasure.*batch_size = 4000"):
        _refused(restricted(), tmp_path / "new", batch_size=4000)
    with pytest.raises(SpecError, match=r"batch_size = 8 .*5 classes.*use at least 10"):
        _refused(restricted(), tmp_path / "new", batch_size=8)
    assert not (tmp_path / "new").exists()


def test_too_few_queries_for_readers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """They are asked for what a batch of erasure is; without readers a rehearsal needs none."""
    around = _around()
    RehearsalTerm.check(Rehearsal(query_batch_size=9), trained_model(), around)
    RehearsalTerm.check(Rehearsal(query_batch_size=10, readers=ONE), trained_model(), around)
    with pytest.raises(SpecError, match=r"query_batch_size = 9 .*5 classes.*use at least 10"):
        Protection(
            trained_model(),
            original=original(),
            restricted=restricted(),
            spec=ProtectSpec(hinder=(Rehearsal(query_batch_size=9, readers=ONE),)),
            out=tmp_path / "new",
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("classes", "needed"), [(2, 10), (5, 12)])
def test_a_domain_of_few_images_is_told_before_settings_nobody_wrote(
    classes: int, needed: int, tmp_path: Path
) -> None:
    def begun(count: int, **changes: Any) -> Protection:
        whole = digits(10 - classes, 10)
        train = Images(whole.train.pixels[:count], whole.train.labels[:count])
        few = dataclasses.replace(whole, train=train)
        return Protection(
            trained_model(),
            original=original(),
            restricted=few,
            spec=ProtectSpec(**changes),
            out=tmp_path / "new" if count < needed else None,
        )

    told = rf"has {needed - 1} training images; erasure needs {needed}: give more"
    with pytest.raises(DataError, match=told):
        begun(needed - 1)
    assert not (tmp_path / "new").exists()
    begun(needed)
    # Who writes the batches is told of those.
    with pytest.raises(DataError, match=r"batch_size = 192; lower it"):
        begun(needed - 1, hinder=({"kind": "erasure"},))


def test_a_domain_of_one_class_is_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)
    with pytest.raises(DataError, match=r"'alone'.*class"):
        _refused(Domain.from_arrays("alone", images), tmp_path / "new", batch_size=16)
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError, match="hold only class 'a'; a domain needs at least 2"):
        Domain.from_arrays("alone", images, np.zeros(100, dtype=np.int64), classes=["a", "b"])


def test_many_classes_are_read_in_larger_batches_unless_one_is_given() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 8), dtype=np.uint8)
    many = Domain.from_arrays("many", images, np.arange(1500) % 150)
    run = Protection(trained_model(), original=original(), restricted=many)
    term, rehearsal = run.spec.hinder or ()
    assert isinstance(term, ErasureSpec)
    assert isinstance(rehearsal, Rehearsal)
    assert (term.batch_size, rehearsal.query_batch_size) == (256, 256)


def test_shards_are_refused() -> None:
    around = dataclasses.replace(_around(), ranks=Ranks(world=2, sharded=True))
    with pytest.raises(UnsupportedModelError, match=r"--shard.*method = 'sophon'"):
        ErasureTerm.check(ErasureSpec(), trained_model(), around)


def _two_domains(**changes: Any) -> Protection:
    """Return a run on two domains that take turns: erasure, and one attacker a round."""
    rehearsal = Rehearsal(steps=1, query_batch_size=8, distribution={"batch_sizes": (8,)})  # type: ignore[arg-type]
    erasure = ErasureSpec(batch_size=24, readers=ONE)
    settings = {"rounds": 2, "hinder": (erasure, rehearsal), "original_batch_size": 16}
    return Protection(
        trained_model(),
        original=original(),
        restricted=[digits(5, 8), digits(8, 10)],
        spec=ProtectSpec(**(settings | changes)),  # type: ignore[arg-type]
        device="cpu",
    )


def test_strategies_and_domains_of_a_record_belong_together() -> None:
    for record in _two_domains():
        assert len(record.strategies) == len(record.domains) == 1


def test_the_query_score_is_the_attackers_where_there_are_any() -> None:
    run = _two_domains()
    _, parts = run.update.hindrance()
    read, attacked = (float(part.score) for part in parts)
    assert read != pytest.approx(attacked, rel=1e-3)
    turn = Turn()
    run.update.note(turn, parts, torch.zeros(()))
    run.update.hinder = run.update.hinder[:1]
    run.update.note(turn, parts[:1], torch.zeros(()))
    assert turn.scores == pytest.approx([attacked, read])


def test_a_score_is_the_first_processs_as_the_gradients_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    term = _term()
    monkeypatch.setattr(Ranks, "follow_first", lambda _, given: [t.fill_(7) for t in given])
    found = term.contribute(trained_model())
    assert float(found.score) == 7
    assert all(bool((gradient == 7).all()) for gradient in found.gradients.values())


def test_readings_of_several_domains_have_their_names() -> None:
    first, second = _two_domains()
    whole = ["R2 early", "R2 late", "R2 middle", "erasure"]
    for record, name in ((first, "digits-5-7"), (second, "digits-8-9")):
        found = [key for key in sorted(record.readings) if not key.startswith("floor")]
        assert found == [f"{one} ({name})" for one in whole]
        text = round_text("12 %", "97 %", record)
        assert re.search(
            rf"price \d.*  R2 early/middle/late (-?\d\.\d\d/?){{3}} \(fresh \d.*\) \({name}\)$",
            text,
        )
    # Two updates a round take a turn each: the line is of the last one.
    (both, *_) = _two_domains(update={"kind": "alternate", "hindrance_steps": 2})
    assert len(both.readings) == 14
    assert round_text("12 %", "97 %", both).count("(") == 2


@pytest.mark.parametrize("kind", ["erasure", "rehearsal"])
def test_a_second_term_of_these_kinds_says_what_to_do_instead(kind: str) -> None:
    with pytest.raises(SpecError, match=rf"two terms of kind '{kind}': give one; \w+"):
        ProtectSpec(hinder=({"kind": kind}, {"kind": kind, "weight": 2.0}))  # type: ignore[arg-type]


# --- What it does ---------------------------------------------------------------------------------


def test_training_erases_and_keeps_the_original_task(tmp_path: Path) -> None:
    spec = ProtectSpec(
        rounds=60,
        hinder=(ErasureSpec(batch_size=96, readers=ONE),),
        guard=Guard(every=20, tolerance_points=3.0),
        original_batch_size=64,
        original_augmentation="none",
        precision="fp32",
    )
    run = Protection(
        trained_model(),
        original=original(),
        restricted=restricted(),
        spec=spec,
        out=tmp_path / "p",
        device="cpu",
    )
    losses = [record.readings["erasure"] for record in run]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    result = run.result()
    assert result.after.value >= result.before.value - 0.03
    # What the folder says of it: less is found than in the given network, at every depth or late.
    (table,) = run._description(result)["readers"].values()
    assert list(table) == ["depths", "fresh", "given", "protected"]
    assert sum(table["protected"]) < sum(table["given"])
