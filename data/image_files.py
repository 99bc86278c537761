"""Image files of other people: opened within bounds, and their samples and colours brought to 8 bits of sRGB.

A small file can ask for a lot of work, and a decoder does not say so before it has done it. What is bounded here is
therefore read from the bytes.
"""

import io
import re
import struct
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from scq.engine.errors import BadImage

# Formats whose header says how large the picture is, and which are decoded in this process. The headers of containers
# of other files (ICO, ICNS) may be wrong, and EPS would start another program. HEIF needs the package pillow-heif.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "HEIF")
LARGEST_SCANS = 100  # of a JPEG; encoders write up to a dozen, and every one of them visits every pixel
LARGEST_WORK = 4_000_000_000  # scans times pixels
LARGEST_PROFILE = 2**20  # bytes of a colour profile in a PNG
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # of a JPEG, but those that may stand inside a scan
_PNG = b"\x89PNG\r\n\x1a\n"
_SRGB = ImageCms.createProfile("sRGB")
_SAME = 2  # levels of 255 by which the profiles that are called sRGB differ from each other


def open_image(encoded: bytes) -> Image.Image:
    """Open an encoded image of one of FORMATS, reading only its header.

    Raises:
        BadImage: decoding its JPEG would take more than LARGEST_SCANS or LARGEST_WORK.
        UnidentifiedImageError and others: it is not an image that Pillow can read.
    """
    Image.init()
    if bytes(encoded[: len(_PNG)]) == _PNG:
        encoded = _without_texts(bytes(encoded))
    image = Image.open(io.BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])
    if image.format in ("JPEG", "MPO"):
        scans = _scans(bytes(encoded))
        if scans > LARGEST_SCANS or scans * image.width * image.height > LARGEST_WORK:
            raise BadImage(
                f"this JPEG of {image.width}x{image.height} pixels takes {scans} scans to decode; save it again, with "
                "the baseline encoding"
            )
    return image


def _scans(jpeg: bytes) -> int:
    """How many scans a JPEG holds, up to the end of its picture: thumbnails and whatever follows it do not count."""
    scans, position = 0, 2
    while found := _MARKER.search(jpeg, position):
        marker, position = found[0][1], found.end()
        if marker == 0xD9:  # the end of the image
            break
        scans += marker == 0xDA
        if marker != 0x01:  # all others have a length, which counts itself
            position += max(2, int.from_bytes(jpeg[position : position + 2], "big"))
    return scans


def _without_texts(encoded: bytes) -> bytes:
    """A PNG without its texts, and without a colour profile of more than LARGEST_PROFILE.

    Nobody here reads the texts, and compressed ones grow a thousandfold. Pillow refuses the whole picture for a long
    one.
    """
    kept, start, last = [], len(_PNG), len(_PNG)
    while start + 12 <= len(encoded):
        (length,), kind = struct.unpack_from(">I", encoded, start), encoded[start + 4 : start + 8]
        end = start + 12 + length
        too_long = kind == b"iCCP" and _is_longer(encoded[start + 8 : end - 4].partition(b"\0")[2][1:], LARGEST_PROFILE)
        if end <= len(encoded) and (kind in (b"tEXt", b"zTXt", b"iTXt") or too_long):
            kept.append(encoded[last:start])
            last = end
        start = end
    return b"".join([encoded[: len(_PNG)], *kept, encoded[last:]]) if kept else encoded


def _is_longer(compressed: bytes, most: int) -> bool:
    """Whether zlib's stream holds more bytes than that; what is damaged does not."""
    try:
        return len(zlib.decompressobj().decompress(compressed, most + 1)) > most
    except zlib.error:
        return False


def to_eight_bits(image: Image.Image, unsigned: bool = False) -> Image.Image:
    """Bring the samples of a greyscale image to 8 bits; other images stay as they are.

    16-bit samples are divided by 257, so that 65535 becomes 255, where Pillow alone would clip them. 32-bit integers
    fill the range of their type, or that of 16 bits if all of them fit there. Floats are shares of white, in [0, 1]. A
    transparent grey becomes white.

    Args:
        unsigned: whether 32-bit integers are unsigned, see `is_unsigned`.

    Raises:
        BadImage: a float is outside of [0, 1], or not a number.
    """
    if image.mode == "F":
        shares = np.asarray(image)
        if not (shares.min() >= 0 and shares.max() <= 1):
            raise BadImage("32-bit float samples outside of [0, 1] have no stated range; convert it to 8 or 16 bits")
        return _like(image, np.rint(255 * shares))
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    samples = np.asarray(image)
    if unsigned:
        samples = samples.view(np.uint32)
    # Pillow opens 16-bit PGM, and before version 11 also 16-bit PNG, as the 32-bit mode "I".
    most = 65535 if samples.max() <= 65535 else np.iinfo(samples.dtype).max
    grey = (samples.astype(np.int64).clip(0, most) * 255 + most // 2) // most
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[samples == transparent] = 255
    return _like(image, grey)


def is_unsigned(image: Image.Image) -> bool:
    """Whether an open image has unsigned 32-bit samples, which only a TIFF says (tag 339); Pillow takes all as signed.

    A copy of the image no longer says it.
    """
    tags = getattr(image, "tag_v2", {})
    return image.mode == "I" and image.format == "TIFF" and tags.get(339, (1,))[0] == 1


def _like(image: Image.Image, grey: np.ndarray) -> Image.Image:
    eight = Image.fromarray(grey.astype(np.uint8))
    if "icc_profile" in image.info:
        eight.info["icc_profile"] = image.info["icc_profile"]
    return eight


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of an 8-bit image from those of its profile to sRGB.

    An image without a profile, with a damaged one or with one for other channels stays as it is, and so does one whose
    profile is sRGB but for rounding. The chunks gAMA, cHRM and cICP of a PNG are not read.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    colours = image.convert(image.mode[:-1]) if alpha is not None else image
    transform = _transform_to_srgb(profile, colours.mode) if colours.mode in ("RGB", "L", "CMYK") else None
    if transform is None:
        return image
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None  # it is only in place that nothing is returned
    if alpha is not None:
        converted.putalpha(alpha)
    elif "transparency" in image.info:  # one colour of RGB or L is transparent
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@lru_cache(maxsize=16)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion from a profile; None if it is damaged, is for other channels, or changes nothing to speak of."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.uint8(np.linspace(0, 255, 16))
    probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3) if mode == "RGB" else levels[None]
    expected = Image.fromarray(probe)
    found = ImageCms.applyTransform(expected, transform)
    difference = np.asarray(found).astype(int) - np.asarray(expected.convert("RGB"))
    return transform if np.abs(difference).max() > _SAME else None
