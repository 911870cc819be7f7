from __future__ import annotations

import io
import pickle
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densessl.datasets import image_io
from densessl.datasets.image_io import (
    JpegImage,
    LoadImage,
    UnreadableImageError,
    open_image,
    open_image_bytes,
    read_image,
)
from densessl.errors import DenseSSLError

# Where the stored picture's first row and first column lie in the upright picture, by
# the EXIF standard's table for orientations 1 to 8.
SIDES = dict(
    zip(
        range(1, 9),
        [
            ('top', 'left'),
            ('top', 'right'),
            ('bottom', 'right'),
            ('bottom', 'left'),
            ('left', 'top'),
            ('right', 'top'),
            ('right', 'bottom'),
            ('left', 'bottom'),
        ],
        strict=True,
    )
)


def photo(height=45, width=70, channels=3):
    """A smooth picture without symmetry, with all channels different."""
    coarse = np.random.default_rng(3).integers(0, 256, (4, 5, channels), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def encode(image, kind, **options):
    """Bytes of an RGB, grey or RGBA array, or of a Pillow picture."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def with_exif(jpeg, tiff):
    segment = b'Exif\0\0' + tiff
    header = b'\xff\xe1' + struct.pack('>H', len(segment) + 2)
    return jpeg[:2] + header + segment + jpeg[2:]


def orientation_block(orientation, order='<'):
    mark = b'II' if order == '<' else b'MM'
    other = struct.pack(order + 'HHII', 0x0100, 4, 1, 70)
    entry = struct.pack(order + 'HHIHH', 0x0112, 3, 1, orientation, 0)
    head = mark + struct.pack(order + 'HIH', 42, 8, 2)
    return head + other + entry + bytes(4)


def as_stored(upright, orientation):
    """What a camera stores: pixel by pixel from the standard's table."""
    height, width = upright.shape[:2]
    rows_at, columns_at = SIDES[orientation]
    swapped = rows_at in ('left', 'right')
    stored = np.empty((width, height, 3) if swapped else (height, width, 3), np.uint8)
    for index in np.ndindex(stored.shape[:2]):
        place = {}
        for step, side in zip(index, (rows_at, columns_at), strict=True):
            axis, length = ('y', height) if side in ('top', 'bottom') else ('x', width)
            place[axis] = step if side in ('top', 'left') else length - 1 - step
        stored[index] = upright[place['y'], place['x']]
    return stored


def save(tmp_path, data, name='picture.jpg'):
    path = tmp_path / name
    path.write_bytes(data)
    return path


LOSSLESS = {  # written by Pillow, with the RGB array that must come out
    'rgb.png': (photo(), photo()),
    'rgb.bmp': (photo(), photo()),
    'rgb.tif': (photo(), photo()),
    'rgb.ppm': (photo(), photo()),
    'grey.png': (photo()[..., 0], photo()[..., [0, 0, 0]]),
    'grey alpha.png': (
        Image.fromarray(photo(channels=4)[..., 2:], 'LA'),
        photo(channels=4)[..., [2, 2, 2]],
    ),
    'rgba.png': (photo(channels=4), photo(channels=4)[..., :3]),
    'palette.png': (
        Image.fromarray(photo()).quantize(16),
        np.asarray(Image.fromarray(photo()).quantize(16).convert('RGB')),
    ),
    'palette.gif': (
        Image.fromarray(photo()).quantize(16),
        np.asarray(Image.fromarray(photo()).quantize(16).convert('RGB')),
    ),
    'one bit.png': (
        Image.fromarray(photo()[..., 0] > 99),
        (photo()[..., [0, 0, 0]] > 99) * np.uint8(255),
    ),
    'one wide.png': (photo(60, 1), photo(60, 1)),
    'one high.png': (photo(1, 60), photo(1, 60)),
    'one pixel.png': (photo(1, 1), photo(1, 1)),
}


@pytest.mark.parametrize('name', LOSSLESS)
def test_lossless_kinds(tmp_path, name):
    picture, wanted = LOSSLESS[name]
    kind = {'tif': 'TIFF'}.get(name[-3:], name[-3:].upper())
    image = read_image(save(tmp_path, encode(picture, kind), name))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, wanted)


def test_webp_and_transparent_palette(tmp_path):
    path = save(tmp_path, encode(photo(), 'WEBP', lossless=True), 'a.webp')
    np.testing.assert_array_equal(read_image(path), photo())
    palette = Image.fromarray(photo()).quantize(16)
    path = save(tmp_path, encode(palette, 'PNG', transparency=3), 'b.png')
    np.testing.assert_array_equal(read_image(path), np.asarray(palette.convert('RGB')))


@pytest.mark.parametrize('ending', ['png', 'tif'])
@pytest.mark.parametrize('channels', [1, 3])
def test_sixteen_bits(tmp_path, ending, channels):
    levels = np.arange(65536, dtype=np.uint16)[:: 257 // 8]
    samples = np.random.default_rng(0).permutation(
        np.resize(levels, 48 * 45 * channels)
    )
    samples = samples.reshape(48, 45, channels)
    path = tmp_path / f'deep.{ending}'
    cv2.imwrite(str(path), samples[..., ::-1])
    wanted = np.broadcast_to(np.rint(samples / 257), (48, 45, 3))
    np.testing.assert_array_equal(read_image(path), wanted)


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'optimize': True}])
@pytest.mark.parametrize('size', [(45, 70), (60, 1), (1, 60), (1, 1)])
def test_jpeg(tmp_path, size, options):
    data = encode(photo(*size), 'JPEG', quality=98, subsampling=0, **options)
    image = read_image(save(tmp_path, data))
    assert image.shape == (*size, 3)
    assert np.abs(image.astype(int) - photo(*size)).max() <= 6


def test_grey_jpeg(tmp_path):
    data = encode(photo()[..., 0], 'JPEG', quality=98)
    image = read_image(save(tmp_path, data)).astype(int)
    assert np.abs(image - photo()[..., [0, 0, 0]]).max() <= 4


def test_cmyk_jpeg(tmp_path):
    data = encode(Image.fromarray(photo()).convert('CMYK'), 'JPEG', quality=98)
    image = read_image(save(tmp_path, data)).astype(int)
    assert np.abs(image - photo()).mean() < 0.8


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('orientation', SIDES)
def test_exif_orientation(tmp_path, orientation, order):
    upright = photo()
    jpeg = encode(as_stored(upright, orientation), 'JPEG', quality=98, subsampling=0)
    jpeg = with_exif(jpeg, orientation_block(orientation, order))
    path = save(tmp_path, jpeg)
    assert open_image(path).shape == (45, 70, 3)
    assert np.abs(read_image(path).astype(int) - upright).max() <= 6


@pytest.mark.parametrize(
    'block',
    [
        orientation_block(0),
        orientation_block(9),
        orientation_block(6)[:20],
        b'',
        b'XX' + orientation_block(6)[2:],
    ],
)
def test_damaged_exif_means_upright(tmp_path, block):
    path = save(tmp_path, with_exif(encode(photo(), 'JPEG'), block))
    assert read_image(path).shape == (45, 70, 3)


JPEG, PNG = encode(photo(), 'JPEG'), encode(photo(), 'PNG')
PROGRESSIVE = encode(photo(), 'JPEG', progressive=True)
CMYK = encode(Image.fromarray(photo()).convert('CMYK'), 'JPEG')
THUMBNAIL = with_exif(JPEG, orientation_block(1) + JPEG)  # holds an end-of-image marker
UNREADABLE = {
    'empty': b'',
    'text': b'these are words, not pixels\n' * 9,
    'markers only': b'\xff\xd8\xff\xd9',
    'half a jpeg': JPEG[: len(JPEG) // 2],
    'most of a jpeg': JPEG[:-40],
    'head of a jpeg': JPEG[:100],
    'half a progressive jpeg': PROGRESSIVE[: len(PROGRESSIVE) // 2],
    'jpeg without its end': JPEG[:-2],
    'half a jpeg with thumbnail': THUMBNAIL[: len(JPEG) + len(JPEG) // 2],
    'half a cmyk jpeg': CMYK[: len(CMYK) // 2],
    'half a png': PNG[: len(PNG) // 2],
    'most of a png': PNG[:-30],
    'half a webp': encode(photo(), 'WEBP')[:300],
    'float samples': encode(Image.fromarray(np.ones((4, 5), np.float32)), 'TIFF'),
}


@pytest.mark.parametrize(
    ('kind', 'lenient'),
    [(kind, False) for kind in UNREADABLE]
    + [(kind, True) for kind in UNREADABLE if 'jpeg' in kind or 'png' in kind],
)
def test_unreadable_files(tmp_path, monkeypatch, kind, lenient):
    path = save(tmp_path, UNREADABLE[kind])
    if lenient:  # some releases of OpenCV decode half a picture and leave the rest grey
        grey = np.full((45, 70, 3), 128, np.uint8)
        monkeypatch.setattr(cv2, 'imdecode', lambda *_: grey.copy())
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path)
    assert isinstance(caught.value, DenseSSLError)
    assert str(path) in str(caught.value)
    assert '\n' not in str(caught.value)
    assert caught.value.why and caught.value.path == str(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UnreadableImageError, match='no such file'):
        read_image(tmp_path / 'nowhere.jpg')
    with pytest.raises(UnreadableImageError, match='directory'):
        read_image(tmp_path)


def test_jpeg_with_appended_bytes_or_thumbnail(tmp_path):
    whole = read_image(save(tmp_path, JPEG))
    for data in (JPEG + b'appended by a camera' * 99, THUMBNAIL):
        np.testing.assert_array_equal(read_image(save(tmp_path, data)), whole)


@pytest.mark.parametrize('reduction', [1, 2])
def test_pillow_steps_in_for_opencv(monkeypatch, reduction):
    jpeg = encode(as_stored(photo(), 6), 'JPEG', quality=98)
    image = open_image_bytes(with_exif(jpeg, orientation_block(6)), 'x.jpg')
    wanted = image.decode(reduction).astype(int)
    monkeypatch.setattr(cv2, 'imdecode', lambda *_: None)
    found = image.decode(reduction)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).mean() < 2
    with pytest.raises(UnreadableImageError, match=r'x\.jpg'):
        JpegImage(JPEG[:300], 'x.jpg', 45, 70).decode()


@pytest.mark.parametrize('reduction', [1, 2, 4, 8])
def test_old_opencv_gives_the_same_colours(monkeypatch, reduction):
    image = open_image_bytes(JPEG, 'x.jpg')
    wanted = image.decode(reduction)
    monkeypatch.setattr(image_io, '_RGB', 0)
    np.testing.assert_array_equal(image.decode(reduction), wanted)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImageError('a/b.jpg', 'it is gone')))
    assert (error.path, error.why) == ('a/b.jpg', 'it is gone')
    assert str(error).startswith("cannot read 'a/b.jpg': it is gone; ")


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    orientation=st.integers(1, 8),
    reduction=st.sampled_from([1, 2, 4, 8]),
)
def test_header_agrees_with_pixels(height, width, orientation, reduction):
    jpeg = encode(photo(height, width), 'JPEG')
    image = open_image_bytes(with_exif(jpeg, orientation_block(orientation)), 'x')
    shape = (height, width) if orientation < 5 else (width, height)
    assert image.shape == (*shape, 3)
    reduced = tuple(-(-side // reduction) for side in shape)
    assert image.decode(reduction).shape == (*reduced, 3)


@pytest.mark.parametrize('orientation', [1, 6])
@pytest.mark.parametrize('reduction', [2, 4, 8])
def test_reduced_decoding_averages_blocks(orientation, reduction):
    upright = photo(120, 160)
    stored = as_stored(upright, orientation)
    jpeg = encode(stored, 'JPEG', quality=98, subsampling=0)
    image = open_image_bytes(with_exif(jpeg, orientation_block(orientation)), 'x')
    blocks = upright.reshape(
        120 // reduction, reduction, 160 // reduction, reduction, 3
    )
    means = blocks.mean(axis=(1, 3))
    assert np.abs(image.decode(reduction) - means).mean() < 1.0


def test_reduction_rule():
    plain = JpegImage(b'', 'x', 301, 400)
    assert [plain.reduction(f) for f in (0.3, 1.9, 2, 3.99, 4, 7.9, 8, 99)] == [
        *(1, 1, 2, 2, 4, 4, 8, 8)
    ]
    turned = JpegImage(b'', 'x', 300, 404, orientation=6)  # 4 divides both sides
    assert [turned.reduction(f) for f in (2, 4, 99)] == [2, 4, 4]
    assert JpegImage(b'', 'x', 301, 400, orientation=3).reduction(99) == 1


def test_load_image(tmp_path):
    path = str(save(tmp_path, JPEG))
    eager = LoadImage()({'path': path})
    lazy = LoadImage(lazy=True)({'path': path})
    assert eager['path'] == path
    assert eager['img'].dtype == np.uint8 and isinstance(lazy['img'], JpegImage)
    np.testing.assert_array_equal(np.asarray(lazy['img']), eager['img'])
    png = str(save(tmp_path, PNG, 'a.png'))
    np.testing.assert_array_equal(LoadImage(lazy=True)({'path': png})['img'], photo())


@pytest.mark.filterwarnings('ignore:.*:UserWarning:PIL')
@settings(deadline=None, max_examples=150)
@given(
    whole=st.sampled_from(
        [JPEG, THUMBNAIL, PROGRESSIVE, CMYK, PNG, encode(photo(), 'TIFF')]
    ),
    changes=st.lists(
        st.tuples(st.integers(0, 250), st.integers(0, 255)), min_size=1, max_size=5
    ),
)
def test_damage_ends_in_a_picture_or_the_one_error(whole, changes):
    damaged = bytearray(whole)
    for place, value in changes:
        damaged[place] = value
    try:
        image = np.asarray(open_image_bytes(bytes(damaged), 'x'))
    except UnreadableImageError:
        return
    except DenseSSLError as error:  # a TIFF whose tags have become those of bands
        assert 'are no colours' in str(error) and whole[:2] == b'II'
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3 and image.shape[2] == 3
