"""The crop protocols against Pillow, and every kind of file against what its pixels mean."""

import io

import numpy as np
import pytest
from data_samples import encoded, photo, pixels
from PIL import Image

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
        image = decode(encoded(Image.fromarray(ramp), format))
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


def test_float_samples_are_refused_with_a_reason():
    with pytest.raises(BadImage, match="32-bit float samples"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


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
