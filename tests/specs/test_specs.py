"""Specifications: what is refused and how, and that a fingerprint tells any two apart."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import sophon
from sophon._base import seeding as _seeding
from sophon._base.errors import SpecError
from sophon._base.seeding import derive_seed, seeded
from sophon._cli.run_spec import PretrainRunSpec, RunSpec
from sophon._protection.spec import ProtectSpec
from sophon._specs import (
    AuditSpec,
    DomainSpec,
    ModelSpec,
    SampleSpec,
    Strategy,
    parse_spec,
    shared_fields,
)
from sophon._specs.base import Spec

FOLDER = Path(__file__).parents[2] / "recipes"
# The grid is a table of cells, not a run.
RECIPES = sorted(
    {*FOLDER.glob("*.toml"), *FOLDER.glob("withstand/*.toml")} - {FOLDER / "grid.toml"}
)
GOOD = {
    "model": {"name": "resnet20"},
    "original": {"source": "npz", "path": "a.npz"},
    "restricted": [{"source": "npz", "path": "b.npz"}],
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path) -> None:
    pretraining = path.stem.endswith("-pretrain")
    kind = PretrainRunSpec if pretraining else RunSpec
    spec = parse_spec(kind, tomllib.loads(path.read_text()), where=path.name)
    assert spec.pretrain if pretraining else isinstance(spec, RunSpec) and spec.restricted
    assert path.stem in path.read_text()


@pytest.mark.parametrize(
    ("section", "wrong", "said"),
    [
        (
            "protect",
            {"ronuds": 3},
            r"unknown key protect\.ronuds; did you mean 'rounds'\? the keys here are .*rounds",
        ),
        ("protect", {"xyzzy": 3}, r"unknown key protect\.xyzzy; the keys here are"),
        (
            "protect",
            {"method": "sopho"},
            r"protect\.method = 'sopho': .*; did you mean 'sophon'\?$",
        ),
        (
            "protect",
            {"update": {"kind": "joint", "averag": 0.9}},
            r"averag; did you mean 'average'\? the keys here are .*pin_norms",
        ),
        (
            "audit",
            {"extra": [{"preparations": [{"kind": "noise_kick", "relativ_std": 1.0}]}]},
            r"relativ_std; did you mean 'relative_std'\?",
        ),
        (
            "audit",
            {"extra": [{"preparations": [{"kind": "fresh_haed"}]}]},
            r"did you mean 'fresh_head'\?",
        ),
        ("protect", {"rounds": "many"}, r"protect\.rounds = 'many'"),
        ("protect", {"rounds": 0}, r"protect\.rounds = 0: .*greater than or equal to 1"),
        ("protect", {"suppression": "icy"}, r"protect\.hinder\.0: rehearsal: loss = 'icy': .*klu"),
        (
            "protect",
            {"suppression_rate": float("nan")},
            r"protect\.update\.alternate\.hindrance_rate = nan",
        ),
        (
            "protect",
            {"rehearsal": {"steps": 9, "horizon": 3}},
            r"protect\.hinder\.0: rehearsal.*horizon = 3 is shorter",
        ),
        ("audit", {"seeds": [1, 1]}, r"seeds repeat"),
        ("audit", {"extra": [{"optimizer": "lion"}]}, r"audit\.extra\.0\.optimizer = 'lion'"),
        (
            "audit",
            {"extra": [{"optimizer": "nesterov", "momentum": 0.0}]},
            r"nesterov needs a momentum above 0",
        ),
        (
            "protect",
            {"guard": {"price": {"start": 3.0, "most": 2.0}}},
            r"start = 3 is above most = 2",
        ),
        (
            "protect",
            {"guard": {"mode": "rollback", "price": {"start": 1.4}}},
            r"price is for mode = 'price'",
        ),
        ("task", {"timestep": 1}, r"timestep is a setting of name = 'denoising'"),
        ("model", {"name": "x", "classes": 1}, r"model\.classes = 1"),
        ("original", {"source": "npz", "validation": 1.5}, r"original\.validation = 1\.5"),
        ("restricted", [], r"restricted = \[\]"),
        ("restricted", [{"source": "npz", "weight": "x"}], r"restricted\.0\.weight = 'x'"),
    ],
)
def test_faults_are_named_with_their_path(section: str, wrong: object, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        parse_spec(RunSpec, {**GOOD, section: wrong}, where="run.toml")
    message = str(caught.value)
    assert message.startswith("run.toml: ")
    assert len(message.splitlines()) <= 2


def test_a_missing_table_is_named() -> None:
    with pytest.raises(SpecError, match="model is missing"):
        parse_spec(RunSpec, {k: v for k, v in GOOD.items() if k != "model"}, where="run.toml")


def test_specs_are_frozen_and_fingerprints_differ() -> None:
    spec = ProtectSpec()
    with pytest.raises(ValidationError):
        spec.rounds = 3  # type: ignore[misc]
    assert spec.fingerprint() == ProtectSpec().fingerprint()
    assert spec.fingerprint() != ProtectSpec(rounds=101).fingerprint()


def test_a_fingerprint_is_of_the_values_in_whatever_order_they_were_written() -> None:
    one, other = (
        parse_spec(ModelSpec, {"name": "timm:resnet18", "arguments": given}, where="here")
        for given in (
            {"drop_rate": 0.1, "zero_init_last": False},
            {"zero_init_last": False, "drop_rate": 0.1},
        )
    )
    assert one.fingerprint() == other.fingerprint()


def test_labels_tell_strategies_apart() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"scope": "head"},
        {"learning_rate": 0.02},
        {"optimizer": "adam"},
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"schedule": "warmup"},
        {"schedule": "warmup", "warmup_steps": 3},
        {"clip_norm": 1.0},
        {"batch_size": 8},
        {"augmentation": "flip"},
        {"precision": "bf16"},
        {"preparations": [{"kind": "fresh_head"}]},
        {"preparations": [{"kind": "reset_last_blocks"}]},
        {"preparations": [{"kind": "reset_last_blocks", "blocks": 2}]},
        {"preparations": [{"kind": "batch_norm"}]},
        {"preparations": [{"kind": "batch_norm", "mode": "reset"}]},
    ]
    labels = {parse_spec(Strategy, change, where="here").label() for change in changes}
    assert len(labels) == len(changes)


def test_streams_depend_on_every_name() -> None:
    seeds = [derive_seed(0), derive_seed(1), derive_seed(0, "a"), derive_seed(0, "a", 1)]
    seeds += [derive_seed(0, "a", "1"), derive_seed(0, 1, "a")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("alone", [True, False])
def test_a_block_draws_what_torch_seeds_and_leaves_the_generator(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_seeding, "_processor_alone", lambda: alone)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with seeded(3, "dropout", 7):
        drawn = torch.rand(4), torch.randn(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(derive_seed(3, "dropout", 7))
    assert torch.equal(torch.rand(4), drawn[0])
    assert torch.equal(torch.randn(4), drawn[1])


def test_a_label_leaves_out_what_every_attack_shares() -> None:
    one = Strategy(batch_size=32, clip_norm=1.0)
    other = Strategy(batch_size=32)
    assert "batch size 32" in one.label()
    shared = shared_fields((one, other))
    assert "batch_size" in shared
    assert "clip_norm" not in shared
    assert one.label(shared) == "direct-all sgd_momentum 0.01 (clip norm 1.0)"
    assert other.label(shared) == "direct-all sgd_momentum 0.01"


def test_a_list_that_is_too_short_says_how_many_are_needed() -> None:
    with pytest.raises(SpecError, match=r"audit: seeds = \[\]: give at least 1$"):
        parse_spec(AuditSpec, {"seeds": []}, where="audit")


PUBLIC = [
    kind
    for kind in (getattr(sophon, name) for name in sophon.__all__)
    if isinstance(kind, type) and issubclass(kind, Spec)
]


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_constructors_raise_a_spec_error_with_the_key(kind: type[Spec]) -> None:
    with pytest.raises(SpecError, match=rf"^{kind.__name__}: .*unknown key wrong; the keys"):
        kind(wrong=1)
    with pytest.raises(SpecError, match=r"\(3\): give every setting by its name"):
        kind(3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (DomainSpec, "path"),
        (DomainSpec, "root"),
        (ModelSpec, "name"),
        (ModelSpec, "weights"),
        (SampleSpec, "extractor"),
    ],
)
def test_a_path_is_taken_where_its_text_is(kind: type[Spec], key: str) -> None:
    rest = {DomainSpec: {"source": "folder"}, ModelSpec: {"name": "resnet20"}}.get(kind, {})
    spec = kind(**{**rest, key: Path("images") / "a"})
    assert spec == kind(**{**rest, key: str(Path("images") / "a")})


def test_a_nested_fault_keeps_its_path_and_a_long_value_is_cut() -> None:
    with pytest.raises(
        SpecError, match=r"ProtectSpec: guard\.tolerance_points = 'x+ \.\.\. x+'"
    ) as held:
        ProtectSpec(guard={"tolerance_points": "x" * 10_000})  # type: ignore[arg-type]
    assert len(str(held.value)) < 300
