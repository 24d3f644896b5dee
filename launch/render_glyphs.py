r"""Render the set of the recipe `glyphs`: 100 Japanese characters, 28 x 28 grey; validation and test images are of designs
of their own.

    apt-get install fontconfig fonts-aoyagi-kouzan-t fonts-aoyagi-soseki fonts-arphic-uming fonts-dejima-mincho \
        fonts-dotgothic16 fonts-droid-fallback fonts-hanazono fonts-horai-umefont fonts-ipafont fonts-kiloji \
        fonts-konatu fonts-kouzan-mouhitsu fonts-misaki fonts-mona fonts-morisawa-bizud-gothic \
        fonts-morisawa-bizud-mincho fonts-motoya-l-cedar fonts-motoya-l-maruberi fonts-mplus fonts-noto-cjk \
        fonts-oradano-mincho-gsrr fonts-reggae fonts-rocknroll fonts-sawarabi-gothic fonts-sawarabi-mincho fonts-seto \
        fonts-stick fonts-takao fonts-train fonts-unifont fonts-vlgothic fonts-yozvox-yozfont-cute fonts-yusei-magic
    .venv/bin/python launch/render_glyphs.py --sheet data/glyphs.png        # writes data/glyphs.npz

More fonts are more designs; fewer are a smaller problem. The same fonts, Pillow and seed give the same file.
"""

import argparse
import io
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pkd.errors import UserError
from pkd.files import write_bytes

HIRAGANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふほまみむめもやゆよらりるれろわをん"
KATAKANA = "アイウオキクケコシスセソチツテナヌネノマメモ"
KANJI = "一人入土大天太小山川左手文日月木本末未気水火犬王生田白目見赤足車雨"
CHARACTERS = HIRAGANA + KATAKANA + KANJI
SIZE = 28
FINE = 4  # times SIZE: the canvas that a glyph is drawn and turned on
ALIKE = 0.95  # correlation of two fonts' pictures of a character from which on they count as one
SHARED = 0.25  # of the characters that two fonts draw alike, from which on they are one design


@dataclass(frozen=True)
class Font:
    file: str
    index: int  # of the face in the file
    families: frozenset[str]


def find_fonts(folders: list[Path], characters: str) -> list[Font]:
    """The scalable faces in `folders` that draw every one of the characters, in the order of their files."""
    pattern = "%{file}\t%{index}\t%{scalable}\t%{variable}\t%{family}\t%{charset}\n"
    try:
        listed = subprocess.run(["fc-scan", "--format", pattern, *map(str, folders)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("fc-scan finds out which font has which characters, but it is not there: "
                        "run apt-get install fontconfig") from None
    wanted, found = {ord(c) for c in characters}, []
    for line in sorted(listed.stdout.splitlines()):
        file, index, scalable, variable, families, charset = line.split("\t")
        if scalable == "True" and variable == "False" and int(index) < 2**16 and wanted <= _codes(charset):
            font = Font(file, int(index), frozenset(name for name in families.split(",") if name))
            if _draws(font, characters):
                found.append(font)
    return found


def _codes(charset: str) -> set[int]:
    """Of fontconfig's "20-7e a0": code points in hexadecimal and ranges of them."""
    codes: set[int] = set()
    for part in charset.split():
        first, _, last = part.partition("-")
        codes.update(range(int(first, 16), int(last or first, 16) + 1))
    return codes


def _draws(font: Font, characters: str) -> bool:
    """Whether the pictures differ: some fonts claim characters that they leave empty or draw as one and the same box."""
    try:
        pictures = {glyph(font, character).tobytes() for character in characters}
    except OSError:  # FreeType does not understand every font
        return False
    return len(pictures) > 0.95 * len(characters) and bytes((FINE * SIZE) ** 2) not in pictures


@cache
def _face(font: Font) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.file, round(0.8 * FINE * SIZE), font.index, layout_engine=ImageFont.Layout.BASIC)


def glyph(font: Font, character: str) -> Image.Image:
    """The character in white on black, its box in the middle of a canvas of FINE * SIZE pixels a side."""
    side, face = FINE * SIZE, _face(font)
    left, top, right, bottom = face.getbbox(character)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text(((side - left - right) / 2, (side - top - bottom) / 2), character, 255, face)
    return canvas


def designs(fonts: list[Font], characters: str) -> list[list[Font]]:
    """Fonts by design, in the order of `fonts`: what shares a name or draws many characters alike is one design.

    Many free fonts, whatever they are called, take their kanji from another one: they then share a third of the characters
    or more, while no more than a seventh are alike in different designs of one kind.
    """
    pictures = np.stack([[_picture(font, character) for character in characters] for font in fonts])
    alike = np.stack([pictures[:, k] @ pictures[:, k].T for k in range(len(characters))]) > ALIKE
    linked = alike.mean(0) >= SHARED
    group = list(range(len(fonts)))
    for a, one in enumerate(fonts):
        for b, other in enumerate(fonts[:a]):
            if linked[a, b] or _same_name(one, other):
                before, now = group[a], group[b]
                group = [now if number == before else number for number in group]
    return [[font for font, number in zip(fonts, group) if number == own] for own in dict.fromkeys(group)]


def _same_name(one: Font, other: Font) -> bool:
    """Whether a family's name continues the other's, as "kiloji - B" does."""
    return any(a.startswith(b) or b.startswith(a) for a in one.families for b in other.families)


def _picture(font: Font, character: str) -> np.ndarray:
    """float32 [576]: the character's box alone at 24 x 24, of mean 0 and norm 1."""
    canvas = glyph(font, character)
    pixels = np.asarray(canvas.crop(canvas.getbbox()).resize((24, 24), Image.Resampling.BOX), np.float32).ravel()
    pixels = pixels - pixels.mean()
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


def divide(found: list[list[Font]], seed: int) -> dict[str, list[list[Font]]]:
    """Designs for training, an eighth of them for validation and a quarter for testing, drawn by seed. Of fewer than five
    none is for validation: that is then images of designs for training, which pkd holds out.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(found))
    test = max(1, round(len(found) / 4))
    validation = test + round(len(found) / 8)
    parts = {"train": order[validation:], "validation": order[test:validation], "test": order[:test]}
    return {name: [found[i] for i in sorted(part)] for name, part in parts.items()}


def image(font: Font, character: str, draw: np.random.Generator) -> np.ndarray:
    """uint8 [SIZE, SIZE]: the character rotated, scaled, sheared, shifted, blurred, in noise, some covered or inverted."""
    angle, shear = np.radians(draw.uniform(-18, 18)), draw.uniform(-0.25, 0.25)
    scale = draw.uniform(0.65, 1.05) * np.array([draw.uniform(0.9, 1.1), 1])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.array([[1, shear], [0, 1]]) @ np.diag(scale))
    side = FINE * SIZE
    middle = np.full(2, side / 2)
    origin = middle - inverse @ (middle + draw.uniform(-2.5, 2.5, 2) * FINE)
    terms = (inverse[0, 0], inverse[0, 1], origin[0], inverse[1, 0], inverse[1, 1], origin[1])
    drawn = glyph(font, character).transform((side, side), Image.Transform.AFFINE, terms, Image.Resampling.BILINEAR)
    drawn = drawn.filter(ImageFilter.GaussianBlur(draw.uniform(0, 1.2) * FINE)).resize((SIZE, SIZE), Image.Resampling.BOX)
    paper, ink = draw.uniform(0, 80), draw.uniform(130, 255)
    pixels = paper + (ink - paper) * np.asarray(drawn, np.float64) / 255
    if draw.random() < 0.4:
        height, width = draw.integers(3, 9, 2)
        row, column = draw.integers(0, SIZE - height), draw.integers(0, SIZE - width)
        pixels[row:row + height, column:column + width] = draw.uniform(0, 255)
    pixels += draw.normal(0, draw.uniform(2, 24), pixels.shape)
    if draw.random() < 0.3:
        pixels = 255 - pixels
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def render(parts: list[list[Font]], characters: str, count: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of each character, uint8 [n, SIZE, SIZE], and labels int64 [n]; every design as often as the others."""
    images = np.empty((len(characters) * count, SIZE, SIZE), np.uint8)
    for label, character in enumerate(characters):
        for number in range(count):
            draw = np.random.default_rng([*seed, label, number])
            design = parts[(number + label) % len(parts)]
            images[label * count + number] = image(design[draw.integers(len(design))], character, draw)
    return images, np.repeat(np.arange(len(characters)), count)


def sheet(arrays: dict[str, np.ndarray], classes: int = 20, each: int = 16) -> Image.Image:
    """Some classes, one a row: images for training on the left, for testing on the right."""
    shown = np.linspace(0, len(arrays["classes"]) - 1, classes).astype(int)
    rows = [np.hstack([np.hstack(arrays[f"x_{part}"][arrays[f"y_{part}"] == label][:each]) for part in ("train", "test")])
            for label in shown]
    return Image.fromarray(np.vstack(rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render a set of glyphs from the fonts of this machine.")
    parser.add_argument("--to", type=Path, default=Path("data/glyphs.npz"))
    parser.add_argument("--fonts", type=Path, nargs="+", default=[Path("/usr/share/fonts")], help="folders of fonts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=len(CHARACTERS), help="so many of them")
    parser.add_argument("--train", type=int, default=200, help="images a character")
    parser.add_argument("--validation", type=int, default=20, help="images a character")
    parser.add_argument("--test", type=int, default=40, help="images a character")
    parser.add_argument("--least", type=int, default=12, help="refuse to go on with fewer designs")
    parser.add_argument("--sheet", type=Path, help="a PNG file with some of the images, to look at")
    arguments = parser.parse_args(argv)
    try:
        make(arguments)
    except UserError as error:
        print(f"render_glyphs: {error}", file=sys.stderr)
        return 2
    return 0


def make(arguments: argparse.Namespace) -> None:
    characters = "".join(CHARACTERS[k] for k in np.linspace(0, len(CHARACTERS) - 1, arguments.characters).astype(int))
    fonts = find_fonts(arguments.fonts, characters)
    found = designs(fonts, characters) if fonts else []
    if len(found) < max(2, arguments.least):
        raise UserError(f"at least {max(2, arguments.least)} designs are needed, but the {len(fonts)} fonts in "
                        f"{', '.join(map(str, arguments.fonts))} that have all {len(characters)} characters are of "
                        f"{len(found)}: install more of the packages named at the top of this script")
    for name, path in (("to", arguments.to), ("sheet", arguments.sheet)):
        if path and path.exists():  # runs know their data by its contents
            raise UserError(f"{path} is there already: delete it, or give another name with --{name}")
    arrays = {"classes": np.array(list(characters))}
    for number, (name, part) in enumerate(divide(found, arguments.seed).items(), 1):  # 0: divide's
        if part:
            print(f"{name}: {sum(map(len, part))} fonts of {len(part)} designs: "
                  + ", ".join(min(min(font.families) for font in design) for design in part))
            arrays[f"x_{name}"], arrays[f"y_{name}"] = render(part, characters, getattr(arguments, name),
                                                              [arguments.seed, number])
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_bytes(arguments.to, packed.getvalue())
    counts = ", ".join(f"{len(arrays[key])} for {key[2:]}" for key in arrays if key.startswith("x_"))
    print(f"{arguments.to}: images of {len(characters)} characters, {counts}, {len(packed.getvalue()) / 1e6:.1f} MB")
    if arguments.sheet:
        picture = io.BytesIO()
        sheet(arrays).save(picture, "PNG")
        write_bytes(arguments.sheet, picture.getvalue())
        print(f"{arguments.sheet}: rows are characters, training images on the left, test images on the right")


if __name__ == "__main__":
    sys.exit(main())
