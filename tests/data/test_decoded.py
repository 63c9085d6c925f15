"""Decoded pictures are kept where the user says so, and are the pixels a decoder would give."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sophon._base.errors import CheckpointError, DataError
from sophon._data import load_domain
from sophon._data.images import Fit
from sophon._data.sources import decoded
from sophon._data.sources.decoded import read_pictures
from sophon._specs import DomainSpec


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    made = []
    for index in range(24):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        made.append(path)
    return made


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOPHON_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def _no_decoder(path: Path, size: int | None) -> None:
    raise AssertionError(f"{path} was decoded again")


def test_pictures_are_decoded_once_for_each_size(
    files: list[Path], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOPHON_CACHE")
    expected = {size: read_pictures(files, Fit(size)) for size in (8, 16)}
    monkeypatch.setenv("SOPHON_CACHE", str(kept))
    for size, pixels in expected.items():
        assert np.array_equal(read_pictures(files, Fit(size)), pixels)
    assert len(list(kept.iterdir())) == 2
    monkeypatch.setattr(decoded, "open_picture", _no_decoder)
    for size, pixels in expected.items():
        assert np.array_equal(read_pictures(files, Fit(size)), pixels)
    monkeypatch.delenv("SOPHON_CACHE")
    with pytest.raises(AssertionError, match="decoded again"):
        read_pictures(files, Fit(8))


def test_a_domain_is_the_same_from_decoded_pictures(files: list[Path], kept: Path) -> None:
    spec = DomainSpec(source="folder", path=str(files[0].parent.parent), image_size=8)
    first, second = (load_domain(spec).fingerprint() for _ in range(2))
    assert list(kept.glob("*.npy"))
    assert first == second


def test_a_changed_file_is_read_anew(files: list[Path], kept: Path) -> None:
    before = read_pictures(files, Fit(8))
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(files[3])
    os.utime(files[3], ns=(1, 1))
    after = read_pictures(files, Fit(8))
    assert not after[3].any()
    assert np.array_equal(before[4], after[4])
    assert len(list(kept.iterdir())) == 2


def test_a_file_changed_to_another_of_its_length_is_read_anew(tmp_path: Path, kept: Path) -> None:
    path = tmp_path / "a.ppm"
    for value, time in ((3, 1), (200, 2)):
        Image.new("RGB", (4, 4), (value,) * 3).save(path)
        os.utime(path, ns=(time, time))
        assert int(read_pictures([path], Fit())[0, 0, 0, 0]) == value
    assert len(list(kept.iterdir())) == 2


def test_files_of_the_same_name_length_and_time_elsewhere_are_others(
    files: list[Path], kept: Path
) -> None:
    others = [path.parent.parent.parent / "others" / path.name for path in files[:2]]
    others[0].parent.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    for number, path in enumerate([*files[:2], *others]):
        Image.fromarray((pixels + number)[:, :, ::-1]).save(path.with_suffix(".ppm"))
        os.utime(path.with_suffix(".ppm"), ns=(1, 1))
    first, second = (
        read_pictures([path.with_suffix(".ppm") for path in several], Fit())
        for several in (files[:2], others)
    )
    assert not np.array_equal(first, second)
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("rest", [0, 40])
def test_a_damaged_entry_is_made_anew(rest: int, files: list[Path], kept: Path) -> None:
    expected = read_pictures(files, Fit(8))
    (entry,) = kept.iterdir()
    entry.write_bytes(entry.read_bytes()[:rest])
    assert np.array_equal(read_pictures(files, Fit(8)), expected)
    assert np.array_equal(np.load(entry), expected)


def test_nothing_is_kept_of_a_damaged_image_or_without_being_asked(
    files: list[Path], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files[5].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"05\.png"):
        read_pictures(files, Fit(8))
    assert list(kept.iterdir()) == []
    monkeypatch.delenv("SOPHON_CACHE")
    assert len(read_pictures(files[:3], Fit(8))) == 3
    assert list(kept.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOPHON_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"file.*name another folder in SOPHON_CACHE") as told:
        read_pictures(files, Fit(8))
    assert "--out" not in str(told.value)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_nothing_is_left_where_the_disk_is_full(files: list[Path], kept: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"make room or name another.*SOPHON_CACHE"):
            read_pictures(files, Fit(16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(kept.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_entries_can_be_read_by_whom_the_user_lets_read(files: list[Path], kept: Path) -> None:
    before = os.umask(0o022)
    try:
        read_pictures(files, Fit(8))
    finally:
        os.umask(before)
    (entry,) = kept.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o644
