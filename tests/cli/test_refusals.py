"""Damaged files and unusable domains: one line each, whatever is wrong with them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from builders import digits, original, restricted, setting_of, trained_model
from sophon._base.errors import CheckpointError, DataError, SpecError
from sophon._data import Domain, check_distinct, load_domain
from sophon._models import read_tensors
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._specs import DomainSpec, Strategy


def test_bytes_flipped_anywhere_in_an_archive_are_one_line(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    images = stream.integers(0, 256, (40, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "whole.npz", x_train=images, y_train=np.arange(40) % 2)
    whole = (tmp_path / "whole.npz").read_bytes()
    chance, said = random.Random(0), []
    for _ in range(300):
        held = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
        (tmp_path / "x.npz").write_bytes(bytes(held))
        try:
            load_domain(DomainSpec(source="npz", path="x.npz"), base=tmp_path)
        except DataError as error:
            said.append(str(error))
    assert len(said) > 50
    assert max(map(len, said)) < 500
    assert all(text.isprintable() for text in said)


def test_bytes_flipped_anywhere_in_a_torch_file_are_one_line(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.zeros(4), "b": torch.ones(2, 2)},
        tmp_path / "whole.pth",
        _use_new_zipfile_serialization=False,
    )
    whole = (tmp_path / "whole.pth").read_bytes()
    chance, said = random.Random(0), []
    for _ in range(300):
        held = bytearray(whole)
        held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
        (tmp_path / "x.pth").write_bytes(bytes(held))
        try:
            read_tensors(tmp_path / "x.pth")
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) > 50
    assert max(map(len, said)) < 600
    assert all(len(text.splitlines()) == 1 for text in said)


def test_the_same_images_in_another_size_are_the_same_data(shared_data: Path) -> None:
    def loaded(size: int, classes: tuple[int, ...]) -> Domain:
        spec = DomainSpec(
            source="npz", path="cifar10.npz", image_size=size, classes=classes, limit=30
        )
        return load_domain(spec, base=shared_data)

    with pytest.raises(DataError, match=r"same data as the original 'cifar10' in another size"):
        check_distinct(loaded(32, (0, 1)), loaded(24, (0, 1)))
    check_distinct(loaded(32, (0, 1)), loaded(24, (2, 3)))


def test_two_domains_of_one_public_set_have_names_of_their_own(tmp_path: Path) -> None:
    kept, refused = (
        load_domain(
            DomainSpec(source="embedded", dataset="letters", name=name, classes=classes, limit=5),
            base=tmp_path,
        )
        for name, classes in (("early", (0, 1, 2)), ("late", (3, 4, 5)))
    )
    assert (kept.name, refused.name) == ("early", "late")
    assert kept.fingerprint() != refused.fingerprint()
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="dataset = 'x' is for torchvision"):
        load_domain(DomainSpec(source="folder", path=".", dataset="x"), base=tmp_path)


def test_an_unknown_users_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"~nobody-of-that-name.*write the folder out"):
        load_domain(DomainSpec(source="npz", path="~nobody-of-that-name/x.npz"), base=tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fixed": Strategy(steps=999)}, "fixed.steps = 999"),
        (
            {"fixed": Strategy(), "distribution": StrategyDistribution(batch_sizes=(8,))},
            "give one",
        ),
    ],
)
def test_settings_of_a_rehearsal_that_would_do_nothing(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        Rehearsal(steps=3, **fields)  # type: ignore[arg-type]


def test_domains_that_share_nothing_are_let_through() -> None:
    setting = setting_of(trained_model(), restricted=(digits(5, 8), digits(8, 10)))
    assert len(setting.restricted) == 2
    renamed = dataclasses.replace(restricted(), name="again")
    with pytest.raises(DataError, match="same data"):
        setting_of(trained_model(), restricted=(restricted(), renamed))
    assert original().class_count == 5
