"""The `embedded` source: two small domains that need no files and no network.

They are for trying sophon out, not for evidence.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sophon._base.errors import DataError, unknown
from sophon._base.seeding import derive_seed
from sophon._base.torchvision_patch import installing, library
from sophon._data.images import Bytes, Fit, Integers
from sophon._data.splits import Contents, part_of_array

SIDE = 16
LETTERS = string.ascii_uppercase
PER_LETTER = 120
CANVAS = 64
_NEEDED, _REMEDY = "the embedded domains need", installing("demo")
# Text fonts only: the other files hold mathematical symbols.
FONTS = tuple(
    f"{name}.ttf"
    for name in (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono"),
        *("DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
        *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    )
)


def read_embedded(name: str, fit: Fit) -> Contents:
    """Return the contents of an embedded domain: `digits` or `letters`, grey, 16x16.

    `digits` are scikit-learn's 1,797 handwritten digits (8x8, enlarged). `letters` are the
    capitals A to Z rendered from the fonts of matplotlib with small rotations, shifts and
    scalings drawn from a fixed seed, 120 of each.

    Raises DataError: an unknown name, or scikit-learn or matplotlib is not installed.
    """
    if name not in EMBEDDED:
        raise DataError(unknown("embedded domain", name, EMBEDDED))
    make, classes = EMBEDDED[name]
    pixels, labels = make()
    return Contents(part_of_array(pixels, labels, fit), None, classes)


@cache
def digits() -> tuple[Bytes, Integers]:
    """Return scikit-learn's handwritten digits, uint8 (1797, 16, 16), and their labels."""
    sets = library("sklearn.datasets", f"{_NEEDED} scikit-learn", _REMEDY, DataError)
    bunch = sets.load_digits()
    # Sixteen grey levels and zero: 0..16 becomes 0..255.
    small = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    enlarged = [
        np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        for one in small
    ]
    return np.stack(enlarged), bunch.target.astype(np.int64)


@cache
def letters() -> tuple[Bytes, Integers]:
    """Return rendered capitals, uint8 (3120, 16, 16), and their labels, A = 0."""
    matplotlib = library("matplotlib", f"{_NEEDED} matplotlib", _REMEDY, DataError)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / name), 60) for name in FONTS]
    pictures, labels = [], []
    for label, letter in enumerate(LETTERS):
        random = np.random.default_rng(derive_seed(0, "letters", letter))
        glyphs = [_glyph(letter, font) for font in fonts]
        for number in range(PER_LETTER):
            pictures.append(_varied(glyphs[number % len(glyphs)], random))
            labels.append(label)
    return np.stack(pictures), np.array(labels, dtype=np.int64)


def _glyph(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    picture = Image.new("L", (CANVAS, CANVAS))
    middle = (CANVAS / 2, CANVAS / 2)
    left, top, right, bottom = font.getbbox(letter, anchor="ls")
    corner = (middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2)
    ImageDraw.Draw(picture).text(corner, letter, fill=255, font=font, anchor="ls")
    return picture


def _varied(glyph: Image.Image, random: np.random.Generator) -> Bytes:
    """Return the glyph turned by up to 20 degrees, scaled by 0.85 to 1.2 in each direction, moved
    by up to a sixteenth of the side, and reduced to 16x16.
    """
    angle = np.deg2rad(random.uniform(-20, 20))
    wide, high = random.uniform(0.85, 1.2, size=2)
    right, down = random.uniform(-CANVAS / 16, CANVAS / 16, size=2)
    cosine, sine, middle = np.cos(angle), np.sin(angle), CANVAS / 2
    # Pillow maps output to input: the inverse of rotation and scaling around the middle.
    a, b, d, e = cosine / wide, sine / wide, -sine / high, cosine / high
    c = middle - a * (middle + right) - b * (middle + down)
    f = middle - d * (middle + right) - e * (middle + down)
    turned = glyph.transform(
        glyph.size,
        Image.Transform.AFFINE,
        tuple(float(value) for value in (a, b, c, d, e, f)),
        Image.Resampling.BILINEAR,
    )
    return Fit().pixels(turned.resize((SIDE, SIDE), Image.Resampling.BOX))


EMBEDDED: dict[str, tuple[Callable[[], tuple[Bytes, Integers]], tuple[str, ...]]] = {
    "digits": (digits, tuple("0123456789")),
    "letters": (letters, tuple(LETTERS)),
}
