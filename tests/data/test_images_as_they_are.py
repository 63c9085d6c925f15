"""Image files that cannot be read, of more than 8 bits, and how pictures are resized."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sophon
from sophon._base.errors import DataError, SpecError
from sophon._data import load_domain
from sophon._data.images import Fit, open_picture
from sophon._models.own_input import recorded_input
from sophon._specs import DomainSpec
from sophon._training.setting import make_setting


def write(folder: Path, count: int = 10, damaged: int = 0, shape: tuple[int, ...] = (9, 8)) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(zlib.crc32(folder.as_posix().encode()))
    for number in range(count):
        pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{folder.name}{number}.png")
        if number < damaged:
            (folder / f"{folder.name}{number}.png").write_bytes(b"no picture")


def load(path: Path, **fields: Any) -> sophon.Domain:
    return load_domain(DomainSpec(source="folder", path=path, **fields))


# --- What cannot be read --------------------------------------------------------------------------


def test_all_files_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / split / "cat", damaged=2)
        write(tmp_path / split / "dog")
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    said = str(caught.value)
    assert "4 of 40 images cannot be used: cat" in said
    assert "on_error = 'skip'" in said
    assert f"{tmp_path / 'train' / 'cat' / 'cat'}" in said
    assert len(said.replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("join", [False, True])
def test_what_cannot_be_read_is_skipped_where_that_is_said(tmp_path: Path, join: bool) -> None:
    for split in ("train", "test"):
        write(tmp_path / split / "cat", damaged=2)
        write(tmp_path / split / "dog")
    domain = load(tmp_path, on_error="skip", join=join, image_size=9)
    splits = (domain.train, domain.validation, domain.test)
    assert sum(map(len, splits)) == 36
    assert any(
        one.startswith("4 images skipped that cannot be used (cat") for one in domain.remarks
    )
    # Each image still has its own label.
    of = {"cat": 0, "dog": 1}
    whole = {
        Fit(9).pixels(Image.open(path)).tobytes(): of[path.parent.name]
        for path in tmp_path.rglob("*.png")
        if path.read_bytes() != b"no picture"
    }
    for split in splits:
        for pixels, label in zip(split.pixels, split.labels, strict=True):
            image = pixels.permute(1, 2, 0).contiguous().numpy()
            assert whole[image.tobytes()] == label


def test_a_class_of_nothing_that_can_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cat", damaged=10)
    write(tmp_path / "dog")
    with pytest.raises(DataError, match="class 'cat' has no images; 10 of 20 images cannot be"):
        load(tmp_path, on_error="skip")
    write(tmp_path / "test" / "cat", damaged=10)
    write(tmp_path / "train" / "cat")
    write(tmp_path / "train" / "dog")
    with pytest.raises(DataError, match="a split has no images; 10 of"):
        load(tmp_path, on_error="skip", classes=["cat", "dog"])


# --- Classes by name ------------------------------------------------------------------------------


def test_classes_are_chosen_by_name_or_number(tmp_path: Path) -> None:
    for name in ("cat", "dog", "eel"):
        write(tmp_path / name)
    named = load(tmp_path, classes=["eel", "cat"])
    assert named.classes == ("eel", "cat")
    assert named.fingerprint() == load(tmp_path, classes=[2, 0]).fingerprint()
    with pytest.raises(DataError, match="unknown class 'eal'; did you mean 'eel'"):
        load(tmp_path, classes=["cat", "eal"])
    with pytest.raises(DataError, match="repeats"):
        load(tmp_path, classes=["cat", 0])
    with pytest.raises(SpecError, match="classes"):
        DomainSpec(source="folder", classes=["cat", 1.5])  # type: ignore[list-item]


# --- More than 8 bits -----------------------------------------------------------------------------


def test_files_of_twelve_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (20, 9, 8), dtype=np.uint16)
    for number, one in enumerate(values):
        place = tmp_path / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(one).save(place / f"{number:02}.png")
    dark = load(tmp_path)
    assert "no pixel is above 15 of 255; 12-bit files need bit_depth = 12" in dark.remarks
    domain = load(tmp_path, bit_depth=12)
    wanted = {(one >> 4).astype(np.uint8).tobytes() for one in values}
    assert {pixels.numpy().tobytes() for pixels in domain.train.pixels} <= wanted
    assert not any("bit_depth" in one for one in domain.remarks)
    with pytest.raises(DataError, match=r"20 of 20 .*values up to \d+, above bit_depth = 10"):
        load(tmp_path, bit_depth=10)


# --- Resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_background_is_put_behind_what_is_transparent(mode: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((200, 200, 200, 255), (0, 0, 4, 8))
    if mode == "P":
        picture = picture.convert("P")
        picture.info["transparency"] = picture.getpixel((7, 7))
    else:
        picture = picture.convert(mode)
    assert Fit().pixels(picture)[0, 7].max() < 200
    seen = 1 if mode == "LA" else 3
    for name, value in (("white", 255), ("grey", 128), ("black", 0)):
        found = Fit(background=name).pixels(picture)
        assert np.atleast_1d(found[0, 7]).tolist() == [value] * seen
        assert abs(int(found[0, 0].max()) - 200) < 5
    file = tmp_path / "a.png"
    picture.save(file)
    white = 255 if mode == "LA" else [255] * 3
    assert open_picture(file, Fit(background="white"))[0, 7].tolist() == white
    # A small one too, of the colour that is seen.
    assert Fit(4, background="white").pixels(picture)[0, 3].tolist() == white


def test_the_line_says_how_many_images_are_transparent_and_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write(tmp_path / "two" / name)
    clear = Image.new("RGBA", (8, 9), (0, 0, 0, 0))
    clear.save(tmp_path / "two" / "a" / "a3.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "two" / "b" / "b1.png", transparency=(0, 0, 0))
    # An alpha channel that hides nothing.
    Image.new("RGBA", (8, 9), (9, 9, 9, 255)).save(tmp_path / "two" / "b" / "b2.png")
    dropped = "transparency of 2 images dropped, as without background"
    laid = "transparency of 2 images laid on white"
    monkeypatch.setenv("SOPHON_CACHE", str(tmp_path / "kept"))
    for _ in ("decoded", "kept"):
        assert dropped in load(tmp_path / "two").remarks
        assert laid in load(tmp_path / "two", background="white").remarks
    items = [(clear if n == 0 else clear.convert("RGB"), n % 2) for n in range(20)]
    domain = sophon.Domain.from_datasets("of-items", items)  # type: ignore[arg-type]
    assert "transparency of 1 images dropped, as without background" in domain.remarks
    (tmp_path / "two" / "a" / "a3.png").unlink()
    (tmp_path / "two" / "b" / "b1.png").unlink()
    assert not any("transparency" in remark for remark in load(tmp_path / "two").remarks)


def test_a_crop_is_what_resizing_and_cutting_is() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8))
    found = Fit(35, "bicubic", 0.875).pixels(picture)
    whole = picture.resize((60, 40), Image.Resampling.BICUBIC)
    wanted = np.asarray(whole.crop((12, 2, 48, 38)))
    assert found.shape == (35, 35, 3)
    # The same square, of 70 pixels in the middle: a corner of one is a corner of the other.
    box = picture.crop((25, 5, 95, 75)).resize((35, 35), Image.Resampling.BICUBIC)
    inner = np.s_[3:-3, 3:-3]
    assert np.abs(found[inner].astype(int) - np.asarray(box)[inner].astype(int)).max() <= 1
    assert abs(float(found.mean()) - float(wanted.mean())) < 2
    assert np.array_equal(Fit(35).pixels(picture), Fit(35, "bilinear", 1.0).pixels(picture))
    assert not np.array_equal(Fit(35).pixels(picture), Fit(35, "bicubic").pixels(picture))


def test_the_networks_own_resizing_is_said_where_another_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write(tmp_path / "keep" / name, shape=(40, 40))
        write(tmp_path / "refuse" / f"{name}{name}", shape=(40, 40))
    spec = sophon.ModelSpec(name="timm:resnet10t", classes=2)
    model, _ = sophon.resolve_model(spec)

    def setting(**fields: Any) -> Any:
        return make_setting(
            model,
            task=sophon.Classification(),
            original=load(tmp_path / "keep", **fields),
            restricted=(load(tmp_path / "refuse", image_size=32),),
        )

    assert setting(image_size=32).input().keys() == {"input_size", "mean", "std"}
    (line,) = caplog.messages
    assert "'keep' is resized with interpolation = 'bilinear' and crop_pct = 1; " in line
    assert "own is interpolation = 'bicubic' and crop_pct = 0.875 (pretrained_cfg" in line
    assert "crop_mode" not in line
    caplog.clear()
    found = setting(image_size=32, interpolation="bicubic", crop_pct=0.875)
    assert not caplog.messages
    assert "resized with bicubic, crop_pct 0.875" in found.original.remarks
    # What a checkpoint says it was trained with is its own.
    (tmp_path / "model.json").write_text(json.dumps({"protection": {"input": found.input()}}))
    recorded_input(model, tmp_path / "model.json")
    setting(image_size=32, interpolation="bicubic", crop_pct=0.875)
    assert not caplog.messages
    setting(image_size=32)
    assert "(its checkpoint's model.json)" in caplog.messages[-1]


def test_resizing_needs_a_size_and_leaves_old_specifications_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="need image_size"):
        load(tmp_path, interpolation="bicubic")
    with pytest.raises(SpecError, match="interpolation = 'cubic'"):
        DomainSpec(source="folder", interpolation="cubic")  # type: ignore[arg-type]
    spec = DomainSpec(source="npz", path="a.npz")
    old = "f4ce55d399861038ac5789ebd1814756bc8116b1861a507652ade5cfec490ce2"
    assert spec.fingerprint() == old
    assert DomainSpec(source="npz", path="a.npz", on_error="skip").fingerprint() != old
