"""The crop protocols against Pillow, and every kind of file against what its pixels mean."""

import contextlib
import io
import struct
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
from data_samples import encoded, photo, pixels
from hypothesis import given, settings, strategies
from PIL import Image, ImageCms, JpegImagePlugin

from scq.data.source import IMAGE_SUFFIXES
from scq.data.transforms import PROTOCOLS, decode, get_protocol, to_rgb
from scq.engine.errors import BadImage, DataError

BICUBIC, BOX = Image.Resampling.BICUBIC, Image.Resampling.BOX


def test_lsun_ldm_is_centre_crop_then_bicubic():
    image = photo(1, 150, 101)
    array = np.asarray(image)
    expected = Image.fromarray(array[0:101, 24:125]).resize((64, 64), BICUBIC)
    assert np.array_equal(PROTOCOLS["lsun-ldm"].apply(image, 64), expected)


def test_lsun_adm_is_box_then_centre_crop():
    image = photo(2, 150, 100)
    expected = image.resize((96, 64), BOX).crop((16, 0, 80, 64))
    assert np.array_equal(PROTOCOLS["lsun-adm"].apply(image, 64), expected)


def test_the_two_lsun_protocols_differ():
    image = photo(2, 150, 101)
    ldm, adm = (pixels(PROTOCOLS[name].apply(image, 64)) for name in ("lsun-ldm", "lsun-adm"))
    assert np.abs(ldm - adm).mean() > 0.5


def test_resize_shorter_keeps_the_shape_and_antialiases():
    image = photo(3, 200, 100)
    expected = image.resize((64, 32), BICUBIC).crop((16, 0, 48, 32))
    assert np.array_equal(PROTOCOLS["resize-shorter"].apply(image, 32), expected)
    # A one-pixel checkerboard is grey when antialiased, black or white when pixels are merely picked.
    board = Image.fromarray(np.uint8(np.indices((64, 64)).sum(0) % 2 * 255)).convert("RGB")
    assert np.abs(pixels(PROTOCOLS["resize-shorter"].apply(board, 16)) - 127).max() < 20


@pytest.mark.parametrize("name", ["lsun-ldm", "lsun-adm", "resize-shorter"])
@pytest.mark.parametrize("shape", [(64, 64), (65, 64), (64, 199), (333, 64)])
def test_protocols_give_exactly_the_size(name, shape):
    assert PROTOCOLS[name].apply(photo(4, *shape), 64).size == (64, 64)


@pytest.mark.parametrize("name", ["lsun-ldm", "lsun-adm", "resize-shorter"])
def test_smaller_than_the_crop_is_refused_not_enlarged(name):
    with pytest.raises(BadImage, match="smaller than the crop: 90x63 < 64x64"):
        PROTOCOLS[name].apply(photo(5, 90, 63), 64)


def test_none_keeps_pixels_and_refuses_another_size():
    image = photo(6, 80, 72)
    assert PROTOCOLS["none"].apply(image, None) is image
    with pytest.raises(BadImage, match="is 80x72, not 72x72"):
        PROTOCOLS["none"].apply(image, 72)


def test_protocol_mistakes_are_named():
    with pytest.raises(DataError, match=r"unknown crop protocol 'lsun'.*lsun-ldm"):
        get_protocol("lsun", 64)
    with pytest.raises(DataError, match="needs an image size"):
        get_protocol("lsun-ldm", None)
    with pytest.raises(DataError, match="at least 1 pixel, not 0"):
        get_protocol("lsun-ldm", 0)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for format in ("PNG", "TIFF", "PPM"):
        grey = Image.fromarray(ramp).convert("I" if format == "PPM" else "I;16")  # Pillow 10 writes no I;16 as PPM
        image = decode(encoded(grey, format))
        expected = np.round(ramp / 257)
        assert image.mode == "RGB"
        assert np.abs(pixels(image)[..., 0] - expected).max() <= 1, format


def test_transparency_is_composited_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[:2, :, 3], rgba[2:, :, 3] = 200, 255, 0
    array = pixels(decode(encoded(Image.fromarray(rgba), "PNG")))
    assert array[0, 0].tolist() == [200, 0, 0]
    assert array[3, 3].tolist() == [255, 255, 255]


def test_palette_with_transparent_colour_becomes_white_there():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    array = pixels(decode(encoded(palette, "PNG", transparency=0)))
    assert array[0, 0].tolist() == [40, 50, 60]
    assert array[3, 3].tolist() == [255, 255, 255]


def test_grey_with_alpha_and_bilevel():
    grey = np.full((2, 2, 2), 100, np.uint8)
    grey[..., 1] = 255
    assert pixels(to_rgb(Image.fromarray(grey, "LA")))[0, 0].tolist() == [100, 100, 100]
    assert pixels(decode(encoded(Image.new("1", (3, 3), 1), "PNG"))).min() == 255


def test_cmyk_jpeg_becomes_the_same_colours():
    colours = Image.new("RGB", (32, 32), (200, 60, 30))
    array = pixels(decode(encoded(colours.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(array - np.array([200, 60, 30])).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = photo(7, 48, 32)
    # The stored pixels are the inverse of what the tag asks for; the tag 5..8 swaps width and height.
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encoded(stored, "PNG", exif=exif)), upright)


def tiff(samples: np.ndarray) -> bytes:
    """A greyscale TIFF of 32-bit samples; Pillow writes signed integers, and unsigned ones differ in one tag."""
    if samples.dtype != np.uint32:
        return encoded(Image.fromarray(samples), "TIFF")
    signed, unsigned = (struct.pack("<HHIH", 339, 3, 1, kind) for kind in (2, 1))
    return encoded(Image.fromarray(samples.view(np.int32)), "TIFF").replace(signed, unsigned)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 127, 255]),
        (np.array([[0, 2**31, 2**32 - 1]], np.uint32), [0, 127, 255]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),  # 16 bits in 32
        (np.array([[-7, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
    ],
)
def test_samples_of_32_bits_are_scaled_not_clipped(samples, expected):
    assert np.abs(pixels(decode(tiff(samples)))[0, :, 0] - expected).max() <= 1


@pytest.mark.parametrize("value", [1.5, -0.1, np.nan, np.inf])
def test_floats_without_a_stated_range_are_refused_with_a_reason(value):
    with pytest.raises(BadImage, match="32-bit float samples"):
        decode(tiff(np.array([[0, value]], np.float32)))


def test_a_transparent_grey_of_16_bits_becomes_white():
    grey = Image.fromarray(np.array([[1000, 2000]], np.uint16))
    assert pixels(decode(encoded(grey, "PNG", transparency=1000)))[0, :, 0].tolist() == [255, 8]


def profile(primaries, gamma=None, grey=False) -> bytes:
    """An ICC profile: three primaries (x, y) of D65 white, or none for greys, and sRGB's curve or a power."""
    srgb = bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", srgb, 128)
    tags = {srgb[132 + 12 * i : 136 + 12 * i]: struct.unpack_from(">II", srgb, 136 + 12 * i) for i in range(count)}
    tags = {name: srgb[start : start + size] for name, (start, size) in tags.items()}
    if gamma is not None:
        curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    if primaries is not None:
        xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
        xyz = xyz * np.linalg.solve(xyz, [0.95047, 1, 1.08883])  # a white of R = G = B = 1
        adapted = np.array([[1.0478, 0.0229, -0.0501], [0.0295, 0.9905, -0.0171], [-0.0092, 0.0151, 0.7517]]) @ xyz
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), adapted.T, strict=True):
            tags[name] = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in column))
    if grey:
        tags = {name: tags[name] for name in (b"desc", b"cprt", b"wtpt")} | {b"kTRC": tags[b"rTRC"]}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    head = bytearray(srgb[:128])
    head[:4] = struct.pack(">I", start + len(body))
    head[16:20] = b"GRAY" if grey else b"RGB "
    return bytes(head) + struct.pack(">I", len(tags)) + table + body


DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_of_another_profile_become_srgb(format):
    """What a phone writes as (60, 200, 60) in Display P3 is a green that sRGB's corner is nearest to."""
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    green = Image.new("RGB", (16, 16), (60, 200, 60))
    found = pixels(decode(encoded(green, format, icc_profile=profile(DISPLAY_P3), **options)))
    assert np.abs(found - [0, 203, 11]).max() <= (3 if format == "JPEG" else 2)
    same = encoded(photo(9), format, **options)
    plain = decode(same)
    for sound in (profile(None), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        assert np.array_equal(decode(encoded(photo(9), format, icc_profile=sound, **options)), plain), "the very bits"


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_other_modes_are_converted_and_keep_their_transparency(mode):
    coloured = Image.new("RGBA", (4, 4), (60, 200, 60, 255))
    coloured.putpixel((3, 3), (60, 200, 60, 0))
    grey = mode in ("L", "LA")
    image = coloured.convert(mode)
    data = encoded(image, "PNG", icc_profile=profile(None, 1.0, True) if grey else profile(DISPLAY_P3))
    expected = {True: [217] * 3, False: [0, 203, 11]}[grey]  # the linear grey 144 is light
    if grey:
        level = image.convert("RGBA").getpixel((0, 0))[0]
        share = level / 255
        expected = [round(255 * (1.055 * share ** (1 / 2.4) - 0.055))] * 3
    found = pixels(decode(data))
    assert np.abs(found[0, 0] - expected).max() <= 2
    if mode in ("RGBA", "LA"):
        assert found[3, 3].tolist() == [255, 255, 255]


def test_a_profile_that_cannot_be_used_is_ignored():
    image, p3 = photo(10), profile(DISPLAY_P3)
    for wrong in (b"", b"nonsense", p3[:200], p3[:100] + bytes(100), profile(None, 1.8, True), bytes(2**21)):
        assert np.array_equal(decode(encoded(image, "PNG", icc_profile=wrong)), image)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


TEXTS = {
    "zTXt": b"key\0\0" + zlib.compress(b"a" * 3_000_000),
    "iTXt": b"key\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000),
    "tEXt": b"key\0" + b"a" * 3_000_000,
    "iCCP": b"key\0\0" + zlib.compress(bytes(100_000_000)),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("after", ["IHDR", "IDAT"])
def test_a_png_is_read_whatever_its_texts_grow_to(kind, after):
    image = photo(11)
    plain = encoded(image, "PNG")
    at = 33 if after == "IHDR" else len(plain) - 12
    data = plain[:at] + 40 * chunk(kind.encode(), TEXTS[kind]) + plain[at:]
    assert np.array_equal(decode(data), image)


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are so many."""
    data = encoded(Image.new("RGB", (side, side), (90, 120, 30)), "JPEG", progressive=True)
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    return data[:-2] + data[starts[-1] : -2] * (count - len(starts)) + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(monkeypatch):
    assert decode(scans(100, 64)).size == (64, 64)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(BadImage, match="64x64 pixels takes 3000 scans"):
        decode(scans(3000, 64))
    with pytest.raises(BadImage, match="8000x8000 pixels takes 80 scans"):
        decode(scans(80, 8000))


def test_thumbnails_and_what_follows_a_jpeg_are_no_scans():
    """A phone's moving photograph has a film behind the picture."""
    data = encoded(photo(12), "JPEG", comment=200 * b"\xff\xda")
    assert decode(data + 200 * b"\xff\xda").size == (72, 72)


def test_formats_that_start_programs_or_hold_other_files_are_not_opened():
    for format in ("EPS", "PDF", "ICO", "ICNS", "PCX"):
        data = encoded(photo(13, 32, 32), format)
        with pytest.raises(BadImage, match="not an image of a known format"):
            decode(data)


def test_every_way_to_be_broken_is_a_bad_image():
    whole = {format: encoded(photo(8), format) for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")}
    for format, data in whole.items():
        with pytest.raises(BadImage):
            decode(data[: len(data) // 2])
        assert decode(data).size == (72, 72), format
    flipped = bytearray(whole["PNG"])
    flipped[len(flipped) // 2] ^= 255
    for data in (b"", b"hello", b"\x89PNG\r\n\x1a\n", bytes(flipped)):
        with pytest.raises(BadImage):
            decode(data)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert pixels(decode(buffer.getvalue()))[0, 0].tolist() == [255, 0, 0]


SUFFIXES = sorted(suffix for suffix in IMAGE_SUFFIXES if Image.registered_extensions().get(suffix) in Image.SAVE)


@cache
def sample(suffix: str) -> bytes:
    """A small file as somebody's camera would write it, with a profile and EXIF where the format has room for them."""
    format = Image.registered_extensions()[suffix]
    image = photo(14, 24, 20).convert({".pbm": "1", ".pgm": "L"}.get(suffix, "RGB"))
    extra = {"icc_profile": profile(DISPLAY_P3)} if format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    if format in ("JPEG", "PNG", "WEBP", "AVIF"):
        extra["exif"] = Image.Exif()
        extra["exif"][0x0112] = 6
    return encoded(image, format, **extra)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(choices=strategies.data())
def test_a_damaged_file_is_an_image_or_a_bad_image(suffix, choices):
    """Nothing else leaves the decoder: not one of the dozen errors that Pillow's plugins raise."""
    data = bytearray(sample(suffix))
    places = strategies.integers(0, len(data) - 1)
    for _ in range(choices.draw(strategies.integers(1, 4))):
        at = choices.draw(places)
        kind = choices.draw(strategies.sampled_from(["byte", "cut", "insert", "erase", "number"]))
        if kind == "byte":
            data[at : at + 1] = bytes([choices.draw(strategies.integers(0, 255))])
        elif kind == "cut":
            del data[max(at, 8) :]
        elif kind == "insert":
            data[at:at] = choices.draw(strategies.binary(max_size=8))
        elif kind == "erase":
            del data[at : at + choices.draw(strategies.integers(1, 40))]
        else:
            data[at : at + 4] = choices.draw(strategies.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"]))
    with contextlib.suppress(BadImage), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(bytes(data)).mode == "RGB"
