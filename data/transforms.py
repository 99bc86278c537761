"""The crop and resize protocols by name, and the one way from anything Pillow opens to 8-bit RGB.

FID depends on how images were cropped and resized, so the protocol is part of every published number. Each protocol
here names the code that it reproduces, and the manifest of every packed set records its protocol.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image, ImageOps

from scq.data.image_files import is_unsigned, open_image, to_eight_bits, to_srgb
from scq.engine.errors import BadImage, DataError

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF_SUFFIXES = frozenset[str]()
else:
    register_heif_opener()
    HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))  # what phones save

WHITE = (255, 255, 255, 255)


class Protocol(NamedTuple):
    """A crop and resize: its description in the manifest, and the function (RGB image, size) -> RGB image."""

    description: str
    apply: Callable[[Image.Image, int | None], Image.Image]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image that Pillow opens to upright 8-bit sRGB.

    EXIF rotation is applied. Colours are converted from the image's profile (see `to_srgb`), and greys of more than 8
    bits are scaled (see `to_eight_bits`). Transparency (an alpha channel, or a transparent colour) is composited on
    white. Only the first frame of an animation is read.

    Raises:
        BadImage: the pixels cannot be decoded; the message gives the decoder's reason.
    """
    with _readable():
        image.load()
        unsigned = is_unsigned(image)
        image = to_srgb(to_eight_bits(ImageOps.exif_transpose(image), unsigned))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
        return image if image.mode == "RGB" else image.convert("RGB")


def decode(encoded: bytes | Image.Image) -> Image.Image:
    """Encoded bytes (or an open image) -> upright 8-bit sRGB image.

    Raises:
        BadImage: it cannot be decoded, or only with far too much work; the message gives the reason.
    """
    with _readable():
        return to_rgb(encoded if isinstance(encoded, Image.Image) else open_image(encoded))


@contextmanager
def _readable() -> Iterator[None]:
    """Turn whatever a decoder raises into BadImage."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image of a known format") from None
    except Exception as error:
        # On broken files, Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more.
        # Whatever it is, the image cannot be used, and the decoder's error is the reason.
        raise BadImage(f"cannot be decoded: {type(error).__name__}: {error}") from error


def require_at_least(image: Image.Image, size: int) -> None:
    """Refuse an image that would have to be enlarged: doing so silently would change the data.

    Raises:
        BadImage: a side is shorter than ``size`` pixels.
    """
    if min(image.size) < size:
        raise BadImage(f"smaller than the crop: {image.width}x{image.height} < {size}x{size}")


def centre_box(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """The (left, top, right, bottom) box of the central square of the given side, in pixels."""
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def lsun_ldm(image: Image.Image, size: int) -> Image.Image:
    """Centre-crop to the shorter side, then antialiased bicubic resize. Source: latent-diffusion, ldm/data/lsun.py."""
    require_at_least(image, size)
    image = image.crop(centre_box(*image.size, min(image.size)))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def lsun_adm(image: Image.Image, size: int) -> Image.Image:
    """Box-resize the shorter side to size, then centre-crop. Source: guided-diffusion, datasets/lsun_bedroom.py."""
    require_at_least(image, size)
    scale = size / min(image.size)
    image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BOX)
    return image.crop(centre_box(*image.size, size))


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to size with antialiased bicubic, then centre-crop the longer side."""
    require_at_least(image, size)
    scale = size / min(image.size)
    image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
    return image.crop(centre_box(*image.size, size))


def stretch(image: Image.Image, size: int) -> Image.Image:
    """Resize to size x size with antialiased bicubic, up or down, whatever the shape: for cut-outs as in GTSRB."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def none(image: Image.Image, size: int | None) -> Image.Image:
    """Keep the pixels as they are.

    Raises:
        BadImage: a size is given, and the image does not have it.
    """
    if size is not None and image.size != (size, size):
        raise BadImage(f"is {image.width}x{image.height}, not {size}x{size} (crop protocol 'none' does not resize)")
    return image


PROTOCOLS: dict[str, Protocol] = {
    "lsun-ldm": Protocol("centre crop to the shorter side, then antialiased bicubic (latent-diffusion)", lsun_ldm),
    "lsun-adm": Protocol("box resize of the shorter side, then centre crop (guided-diffusion)", lsun_adm),
    "resize-shorter": Protocol("bicubic antialiased resize of the shorter side, then centre crop", resize_shorter),
    "stretch": Protocol("bicubic antialiased resize of both sides, shape not kept, enlarging allowed", stretch),
    "none": Protocol("pixels as they are", none),
}


def get_protocol(name: str, size: int | None) -> Protocol:
    """The protocol of that name.

    Args:
        size: side of the square images in pixels; None for protocol 'none' only.

    Raises:
        DataError: there is no such protocol, or the size is missing or below 1.
    """
    if name not in PROTOCOLS:
        raise DataError(f"unknown crop protocol '{name}'; choose one of: {', '.join(PROTOCOLS)}")
    if size is None and name != "none":
        raise DataError(f"crop protocol '{name}' needs an image size (--size N); only 'none' keeps the source's")
    if size is not None and size < 1:
        raise DataError(f"image size must be at least 1 pixel, not {size}")
    return PROTOCOLS[name]
