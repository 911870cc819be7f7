"""Pictures of any channels and depth: read, cut, coloured and normalised."""

from __future__ import annotations

import math
import sys

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densessl.datasets import (
    LoadChannels,
    LoadImage,
    MultiCrop,
    UnlabelledImages,
    UnreadableImageError,
    ViewRecipe,
    collate_views,
    read_channels,
)
from densessl.datasets.channels import resize_channels, shown_as_rgb
from densessl.datasets.image_io import read_image
from densessl.datasets.transforms import photometric
from densessl.datasets.transforms.multi_crop import resize_crop
from densessl.errors import DenseSSLError
from densessl.models import ViewPreprocessor

tifffile = pytest.importorskip('tifffile')
TYPES = {8: np.uint8, 16: np.uint16}
OFF = dict(jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)


def noise(*shape, bits=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**bits, shape, dtype=TYPES[bits])


def smooth(height, width, channels, bits=16, seed=1):
    """A picture with edges and slopes over nearly the whole range."""
    coarse = np.random.default_rng(seed).integers(0, 2**bits, (5, 6, channels))
    planes = [
        cv2.resize(plane.astype(np.float64), (width, height))
        for plane in np.moveaxis(coarse, 2, 0)
    ]
    return np.stack(planes, -1).astype(TYPES[bits])


def write_tiff(path, array, **options):
    options = dict(photometric='minisblack') | options
    tifffile.imwrite(path, array, **options)
    return path


# Reading


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('channels', [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize('layout', ['contig', 'separate', 'pages'])
@pytest.mark.parametrize('compression', [None, 'zlib', 'lzw'])
def test_tiff_of_any_layout(tmp_path, bits, channels, layout, compression):
    image = noise(20, 30, channels, bits=bits)
    stored, options = image, dict(compression=compression)
    if channels == 1:
        stored = image[..., 0]
    elif layout == 'contig':
        options.update(planarconfig=layout)
    else:
        stored = np.ascontiguousarray(np.moveaxis(image, 2, 0))
        options.update(planarconfig=layout if layout == 'separate' else None)
    path = write_tiff(tmp_path / 'a.tif', stored, **options)
    found = read_channels(path, channels, bits)
    np.testing.assert_array_equal(found, image)
    assert found.dtype == image.dtype and found.flags.c_contiguous


@pytest.mark.parametrize(
    'options',
    [
        dict(byteorder='>'),
        dict(bigtiff=True),
        dict(tile=(16, 16)),
        dict(predictor=True),
    ],
)
def test_tiff_of_other_kinds(tmp_path, options):
    image = noise(20, 30, 5)
    if 'predictor' in options:
        options = dict(options, compression='zlib')
    options = dict(options, planarconfig='contig')
    path = write_tiff(tmp_path / 'a.tif', image, **options)
    found = read_channels(path, 5, 16)
    np.testing.assert_array_equal(found, image)
    assert found.dtype.isnative
    torch.from_numpy(found)


def test_tiff_with_colours_and_palette(tmp_path):
    image = noise(20, 30, 3)
    write_tiff(tmp_path / 'rgb.tif', image, photometric='rgb')
    np.testing.assert_array_equal(read_channels(tmp_path / 'rgb.tif', 3, 16), image)
    indices, colours = noise(20, 30, bits=8), noise(3, 256, bits=8)
    table = colours.astype(np.uint16) * 257
    write_tiff(tmp_path / 'p.tif', indices, photometric='palette', colormap=table)
    found = read_channels(tmp_path / 'p.tif', 3, 8)
    np.testing.assert_array_equal(found, np.moveaxis(colours[:, indices], 0, 2))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    bits=st.sampled_from([8, 16]),
    big_endian=st.booleans(),
)
def test_npy_axis_of_channels(tmp_path_factory, shape, bits, big_endian):
    array = noise(*shape, bits=bits)
    path = tmp_path_factory.mktemp('npy') / 'a.npy'
    np.save(path, array.astype(array.dtype.newbyteorder('>' if big_endian else '=')))
    last, first = array, array.transpose(1, 2, 0)
    for channels in range(1, 7):
        if channels in (shape[2], shape[0]):
            wanted = last if channels == shape[2] else first
            found = read_channels(path, channels, bits)
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == TYPES[bits]
        else:
            with pytest.raises(DenseSSLError, match=f'{channels} channel'):
                read_channels(path, channels, bits)
    wanted = first if shape[0] < shape[2] else last
    np.testing.assert_array_equal(read_channels(path), wanted)


@pytest.mark.parametrize(
    ('ending', 'kind', 'channels', 'bits'),
    [
        ('png', 'L', 1, 8),
        ('png', 'I;16', 1, 16),
        ('png', 'RGB', 3, 8),
        ('png', 'RGBA', 4, 8),
        ('png', 'P', 3, 8),
        ('bmp', 'L', 1, 8),
        ('bmp', 'RGB', 3, 8),
        ('webp', 'RGB', 3, 8),
        ('webp', 'RGBA', 4, 8),
    ],
)
def test_kinds_that_pillow_writes(tmp_path, ending, kind, channels, bits):
    image, path = smooth(20, 30, channels, bits), tmp_path / f'a.{ending}'
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    if kind == 'P':
        picture = picture.quantize(32)
        image = np.asarray(picture.convert('RGB'))
    assert picture.mode == kind
    lossless = dict(lossless=True, exact=True) if ending == 'webp' else {}
    picture.save(path, **lossless)
    np.testing.assert_array_equal(read_channels(path, channels, bits), image)


def test_colours_of_16_bits_are_in_order(tmp_path):
    for channels in (3, 4):
        image = noise(8, 9, channels)
        stored = image[..., [2, 1, 0, 3][:channels]]
        cv2.imwrite(str(tmp_path / 'a.png'), stored)
        found = read_channels(tmp_path / 'a.png', channels, 16)
        np.testing.assert_array_equal(found, image)


def test_a_jpeg_is_upright_as_the_rgb_reader_has_it(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f'{orientation}.jpg'
        Image.fromarray(smooth(20, 30, 3, 8)).save(path, exif=exif)
        np.testing.assert_array_equal(read_channels(path), read_image(path))
        Image.fromarray(smooth(20, 30, 1, 8)[..., 0]).save(path, exif=exif)
        grey = read_channels(path, 1, 8)
        np.testing.assert_array_equal(grey, read_image(path)[..., :1])


def test_other_channels_or_bits_name_file_find_and_remedy(tmp_path):
    path = write_tiff(tmp_path / 'a.tif', noise(4, 6, 5), planarconfig='contig')
    wanted = (
        f"'{path}' has 5 channels of 16 bits, and 1 channel of 8 bits are expected; "
        'set pictures.channels=5 pictures.bits=16 if all are like this one, else '
        'convert it or take it out of the folder'
    )
    with pytest.raises(DenseSSLError) as error:
        read_channels(path, 1, 8)
    assert str(error.value) == wanted
    assert not isinstance(error.value, UnreadableImageError)  # it stops the run


@pytest.mark.parametrize(
    ('array', 'match'),
    [
        (np.zeros((4, 5, 2), np.float32), 'float32 samples; 8 or 16 bits'),
        (np.zeros((4, 5, 2), np.int16), 'int16 samples'),
        (np.zeros(4, np.uint8), r'array of \(4,\)'),
        (np.zeros((2, 3, 4, 5), np.uint8), r'array of \(2, 3, 4, 5\)'),
        (np.zeros((0, 3), np.uint8), 'not empty'),
    ],
)
def test_arrays_that_are_no_pictures(tmp_path, array, match):
    np.save(tmp_path / 'a.npy', array)
    with pytest.raises(DenseSSLError, match=match) as error:
        read_channels(tmp_path / 'a.npy')
    assert '\n' not in str(error.value)


def test_tiff_of_too_many_axes(tmp_path):
    path = write_tiff(tmp_path / 'a.tif', noise(4, 5, 6, 3), photometric='rgb')
    with pytest.raises(DenseSSLError, match=r'\(4, 5, 6, 3\).*one axis of channels'):
        read_channels(path)


def damaged(tmp_path):
    """A sound file of each kind, and its bytes."""
    image = noise(40, 30, 5)
    write_tiff(tmp_path / 'raw.tif', image, planarconfig='contig')
    for compression in ('zlib', 'lzw', 'zstd'):
        path, options = tmp_path / f'{compression}.tif', dict(compression=compression)
        write_tiff(path, image, planarconfig='contig', **options)
    np.save(tmp_path / 'a.npy', image)
    cv2.imwrite(str(tmp_path / 'a.png'), image[..., 0])
    return [(path, path.read_bytes()) for path in sorted(tmp_path.iterdir())]


def test_cut_off_files_are_broken(tmp_path):
    for path, data in damaged(tmp_path):
        for end in [0, 3, 7, 9, 50, 200, 600, len(data) // 2, len(data) - 9]:
            path.write_bytes(data[:end])
            with pytest.raises(UnreadableImageError) as error:
                read_channels(path)
            assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_damaged_files_end_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    for path, data in damaged(tmp_path):
        if path.suffix != '.tif':
            continue
        for _ in range(40):
            bad = bytearray(data)
            place = int(rng.integers(8, 300))
            bad[place] = int(rng.integers(256))
            path.write_bytes(bad)
            try:
                image = read_channels(path)
            except DenseSSLError as error:  # UnreadableImageError is one
                assert str(path) in str(error) and '\n' not in str(error)
            else:
                assert image.ndim == 3


def test_missing_packages_are_named(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / 'a.tif', noise(4, 6, 5), planarconfig='contig')

    def refuse(*_, **__):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    with monkeypatch.context() as patch:
        patch.setattr(tifffile.TiffPageSeries, 'asarray', refuse)
        with pytest.raises(DenseSSLError, match=r'needs imagecodecs.*densessl\[tiff\]'):
            read_channels(path)
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(
        DenseSSLError, match=r'not installed.*densessl\[tiff\]'
    ) as error:
        read_channels(path)
    assert not isinstance(error.value, UnreadableImageError)


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('channels', [2, 3, 4, 5])
def test_rgb_reader_refuses_bands_that_are_no_colours(tmp_path, channels, bits):
    # OpenCV alone makes a grey picture of one band, or of halves of samples.
    for options in (dict(), dict(bigtiff=True), dict(byteorder='>')):
        image = noise(20, 30, channels, bits=bits)
        path = write_tiff(tmp_path / 'a.tif', image, planarconfig='contig', **options)
        if (channels, bits) == (2, 8):
            np.testing.assert_array_equal(read_image(path)[..., 0], image[..., 0])
            continue
        with pytest.raises(DenseSSLError, match=f'pictures.channels={channels}'):
            read_image(path)
    image = noise(20, 30, 3, bits=bits)
    path = write_tiff(tmp_path / 'rgb.tif', image, photometric='rgb')
    wanted = image if bits == 8 else (image / 257).round().astype(np.uint8)
    assert np.abs(read_image(path).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize('arguments', [(0,), ('rgb',), (5, 12), (5, 32), (2.0,)])
def test_loader_arguments(arguments):
    with pytest.raises(DenseSSLError, match='LoadChannels'):
        LoadChannels(*arguments)


def test_dataset_takes_the_readers_endings(tmp_path):
    np.save(tmp_path / 'a.npy', noise(20, 30, 5))
    (tmp_path / 'list.txt').write_text('a.npy 3\n')
    pipeline = [dict(type='LoadChannels', channels=5, bits=16)]
    for list_file in (None, str(tmp_path / 'list.txt')):
        data = UnlabelledImages(str(tmp_path), list_file, pipeline=pipeline)
        np.testing.assert_array_equal(data.picture(0), np.load(tmp_path / 'a.npy'))
        assert data[0]['img'].shape == (20, 30, 5)
        with pytest.raises(DenseSSLError, match='no picture'):
            UnlabelledImages(str(tmp_path), list_file, pipeline=[LoadImage()])


# Views


def pillow_bicubic(image, box, size):
    """Pillow's antialiased bicubic resampling, from its definition, in float64."""

    def weights(start, length, out):
        scale = length / out
        reach = 2 * max(scale, 1.0)
        rows = np.zeros((out, length))
        for i in range(out):
            centre = (i + 0.5) * scale
            for j in range(length):
                t = abs(j + 0.5 - centre) / max(scale, 1.0)
                if abs(j + 0.5 - centre) >= reach:
                    continue
                a = -0.5
                rows[i, j] = (
                    (a + 2) * t**3 - (a + 3) * t**2 + 1
                    if t < 1
                    else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
                )
            rows[i] /= rows[i].sum()
        return rows

    x, y, w, h = box
    crop = image[y : y + h, x : x + w].astype(np.float64)
    down, across = weights(y, h, size[0]), weights(x, w, size[1])
    return np.einsum('ih,hwc,jw->ijc', down, crop, across)


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('channels', [1, 2, 4, 5, 13])
def test_views_agree_with_a_float64_reference(channels, bits):
    image, most = noise(50, 64, channels, bits=bits), 2**bits - 1
    if bits == 8:  # torch's kernel cuts its intermediate values at 0 and 255
        image = 64 + image // 2
    view = dict(size=(20, 27), scale=(0.1, 1.0), count=4, flip=0.5, **OFF)
    crop = MultiCrop([dict(role='a', **view)])
    for seed in range(3):
        results = crop(dict(img=image, rng=np.random.default_rng(seed)))
        views, geometry = results['inputs']['a'], results['geometry']
        assert views.shape == (4, channels, 20, 27)
        assert views.dtype == (torch.uint8 if bits == 8 else torch.uint16)
        for i in range(4):
            wanted = pillow_bicubic(image, geometry.box[i].int().tolist(), (20, 27))
            if geometry.flip[i]:
                wanted = wanted[:, ::-1]
            found = views[i].numpy().transpose(1, 2, 0).astype(int)
            distance = np.abs(found - wanted.clip(0, most)).max()
            assert distance <= (2 if bits == 8 else 0.6)


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 7),
    bits=st.sampled_from([8, 16]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    seed=st.integers(0, 2**16),
)
def test_any_picture_makes_views_like_the_rgb_ones(
    channels, bits, height, width, size, seed
):
    view = dict(size=size, scale=(0.05, 1.0), count=3, blur=0.5, solarize=0.5)
    crop = MultiCrop([dict(role='a', **view)])
    shape, rng = (height, width, channels), np.random.default_rng(seed)
    made = crop(dict(img=noise(*shape, bits=bits), rng=rng))
    rgb_rng = np.random.default_rng(seed)
    rgb = crop(dict(img=noise(height, width, 3, bits=8), rng=rgb_rng))
    assert made['inputs']['a'].shape == (3, channels, *size)
    # the same numbers are drawn, so that crops do not depend on the kind of picture
    assert made['geometry'].box.equal(rgb['geometry'].box)
    assert made['geometry'].flip.equal(rgb['geometry'].flip)
    assert rng.random() == rgb_rng.random()


def test_whole_range_survives_a_resize():
    white = np.full((9, 9, 5), 65535, np.uint16)
    assert (resize_crop(white, (0, 0, 9, 9), (4, 20)) == 65535).all()
    edge = np.zeros((9, 40, 5), np.uint16)
    edge[:, 20:] = 65535  # bicubic filters overshoot at an edge
    found = resize_crop(edge, (0, 0, 40, 9), (9, 90))
    assert {0, 65535} <= set(found.ravel().tolist())
    assert found[:, :20].max() < 100 and found[:, -20:].min() > 65435


# Colours


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([1, 2, 4, 5, 13]),
    bits=st.sampled_from([8, 16]),
    factor=st.floats(0, 2.5),
    sigma=st.floats(0.3, 2.0),
    threshold=st.integers(0, 256),
)
def test_operations_act_on_each_channel(channels, bits, factor, sigma, threshold):
    image = smooth(13, 17, channels, bits)
    most = 2**bits - 1
    for c in range(channels):
        values = image[..., c].astype(np.float64)
        bright = photometric.adjust_brightness(image, factor)[..., c]
        assert np.abs(bright - (factor * values).clip(0, most)).max() <= 0.51
        mean = sum(map(float, values.ravel())) / values.size
        wanted = (mean + factor * (values - mean)).clip(0, most)
        contrast = photometric.adjust_contrast(image, factor)[..., c]
        assert np.abs(contrast - wanted).max() <= 0.51
        lowest = threshold * (most + 1) / 256  # half of the range for 128
        inverted = np.where(values < lowest, values, most - values)
        np.testing.assert_array_equal(
            photometric.solarize(image, threshold)[..., c], inverted
        )
        blurred = photometric.gaussian_blur(image, sigma)[..., c]
        reach = 3 if bits == 8 else 4  # in deviations; where OpenCV cuts the bell
        tolerance = (1 + most / 255) if bits == 8 else 4
        wanted = blur(values, sigma, reach)
        assert np.abs(blurred - wanted).max() <= tolerance


def blur(plane, sigma, reach):
    """Gaussian blur by its sum, the border repeated; the bell is cut as by OpenCV."""
    half = (round(sigma * reach * 2 + 1) | 1) // 2
    bell = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-half, half + 1)]
    for axis in (0, 1):
        places = np.arange(plane.shape[axis])
        plane = sum(
            weight * plane.take((places + k).clip(0, len(places) - 1), axis)
            for k, weight in zip(range(-half, half + 1), bell, strict=True)
        ) / sum(bell)
    return plane


@pytest.mark.parametrize('name', ['jitter', 'grayscale'])
@pytest.mark.parametrize('channels', [1, 2, 4, 5])
def test_colours_are_left_alone_where_there_are_none(name, channels):
    image = noise(9, 9, channels)
    options = OFF | {name: 1.0} | dict(jitter_strength=(0, 0, 0.9, 0.5))
    recipe = ViewRecipe('a', 9, (0.2, 1.0), **options)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert photometric.augment(image, recipe, rng) is image
    rgb = noise(9, 9, 3)
    assert not np.array_equal(photometric.augment(rgb, recipe, rng), rgb)


def test_rgb_of_16_bits_is_treated_as_of_8():
    small = smooth(20, 30, 3, 8)
    large = small.astype(np.uint16) * 257
    for name, amount in (
        ('adjust_brightness', 0.7),
        ('adjust_contrast', 1.4),
        ('adjust_saturation', 0.3),
        ('adjust_hue', 0.1),
        ('adjust_hue', -0.3),
        ('gaussian_blur', 1.0),
        ('solarize', 100),
    ):
        operation = getattr(photometric, name)
        wanted, found = operation(small, amount), operation(large, amount) / 257
        levels = 12 if name == 'adjust_hue' else 1.6  # 8-bit hue is rounded twice
        assert np.abs(found - wanted).max() <= levels, name
    grey = photometric.to_grayscale(large)
    assert np.abs(grey / 257 - photometric.to_grayscale(small)).max() <= 0.6


def test_hue_of_16_bits_agrees_with_the_standard_library():
    import colorsys

    image = smooth(6, 7, 3)
    found = photometric.adjust_hue(image, 0.2)
    for pixel, turned in zip(image.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 65535))
        wanted = np.array(colorsys.hsv_to_rgb((hue + 0.2) % 1, saturation, value))
        assert np.abs(turned - 65535 * wanted).max() <= 1.5


# To the device


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('channels', [1, 2, 4, 5])
def test_normalised_in_the_pictures_own_units(channels, bits):
    crop = MultiCrop([dict(role='a', size=8, scale=(0.5, 1.0), count=2)])
    samples = []
    for i in range(3):
        image = noise(20, 30, channels, bits=bits, seed=i)
        results = crop(dict(img=image, rng=np.random.default_rng(i)))
        samples.append(dict(results, path=f'{i}.tif'))
    mean = [2**bits * (0.2 + 0.1 * c) for c in range(channels)]
    std = [2**bits * (0.1 + 0.02 * c) for c in range(channels)]
    batch = collate_views(samples)
    assert batch['inputs']['a'].shape == (3, 2, channels, 8, 8)
    found = ViewPreprocessor(mean, std)(batch)['inputs']['a'].numpy()
    assert found.dtype == np.float32
    for i, sample in enumerate(samples):
        for c in range(channels):
            values = sample['inputs']['a'][:, c].numpy().astype(np.float64)
            wanted = (values - mean[c]) / std[c]
            np.testing.assert_allclose(found[:, i, c], wanted, atol=1e-5)


def test_preprocessor_refuses_other_channels_and_units():
    views = dict(inputs=dict(a=torch.zeros(1, 1, 1, 4, 4, dtype=torch.uint8)))
    with pytest.raises(DenseSSLError, match='3 channels and the pictures have 1'):
        ViewPreprocessor()(views)  # would be stretched to three
    with pytest.raises(DenseSSLError, match='above 255 and the pictures have 8 bits'):
        ViewPreprocessor([300.0], [20.0])(views)
    for mean, std in (([1.0], [0.0]), ([1.0, 2.0], [1.0]), ([], [])):
        with pytest.raises(DenseSSLError, match='std > 0'):
            ViewPreprocessor(mean, std)


# To look at


def test_shown_as_rgb():
    rgb = noise(4, 5, 3, bits=8)
    assert np.shares_memory(shown_as_rgb(rgb), rgb)
    five = noise(2, 4, 5, 5, bits=8)
    np.testing.assert_array_equal(shown_as_rgb(five), five[..., :3])
    grey = noise(4, 5, 2, bits=8)
    np.testing.assert_array_equal(shown_as_rgb(grey), grey[..., [0, 0, 0]])
    wide = np.array([0, 500, 1000], np.uint16).reshape(1, 3, 1)
    assert shown_as_rgb(wide)[0, :, 1].tolist() == [0, 128, 255]
    assert not shown_as_rgb(np.zeros((2, 2, 1), np.uint16)).any()


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 5, 40])
def test_resize_channels_is_that_of_each_plane(channels):
    image = noise(11, 13, channels)
    found = resize_channels(image, (7, 5), cv2.INTER_AREA)
    for c in range(channels):
        plane = np.ascontiguousarray(image[..., c])
        wanted = cv2.resize(plane, (5, 7), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(found[..., c], wanted)
