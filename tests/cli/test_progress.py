"""What takes a while is shown, what does not is not, and a display is never inside another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sophon._base.counting import counted, watching
from sophon._cli import progress
from sophon._cli.progress import Display
from sophon._data import load_domain
from sophon._specs import DomainSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for number in range(20):
            pixels = np.full((8, 8, 3), 10 * number + label, np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"class{label}" / f"{number}.png")
    return tmp_path


def read(folder: Path) -> None:
    with watching(lambda noun, total: Display.late("lines", noun, total)):
        load_domain(DomainSpec(source="folder", path="."), base=folder)


def test_decoding_is_shown_where_it_takes_long(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LATE_S", -1.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    read(folder)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) >= 40
    assert shown[0].startswith("image 1/")
    assert " left" in shown[0]


def test_no_display_is_inside_another(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LATE_S", -1.0)
    with Display("bar", noun="trial", total=1, todo=1):
        read(folder)
    assert "image" not in capsys.readouterr().err
    read(folder)
    assert "image" in capsys.readouterr().err


def test_nobody_watches_unless_asked() -> None:
    assert list(counted(iter("abc"), "letter", 3)) == ["a", "b", "c"]
    seen: list[int] = []
    with watching(lambda noun, total: Display.late("quiet", noun, total)):
        for one in counted(range(3), noun="number", total=3):
            seen.append(one)
    assert seen == [0, 1, 2]
    assert Display.displays == 0
