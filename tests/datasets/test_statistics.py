"""Mean and standard deviation of pictures against numpy's over all their pixels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densessl.datasets import UnlabelledImages, channel_statistics, statistics
from densessl.engine.launch import parse_args
from densessl.errors import DenseSSLError


def write(folder, pictures):
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures):
        np.save(folder / f'{i:04d}.npy', picture)
    return folder


def noise(rng, height, width, channels, bits):
    most = rng.integers(1, 2**bits, channels)
    return (rng.random((height, width, channels)) * most).astype(f'uint{bits}')


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 6),
    bits=st.sampled_from([8, 16]),
    sizes=st.lists(st.tuples(st.integers(7, 20), st.integers(7, 20)), min_size=1),
    seed=st.integers(0, 999),
)
def test_equals_numpy_over_all_pixels(tmp_path_factory, channels, bits, sizes, seed):
    rng = np.random.default_rng(seed)
    pictures = [noise(rng, *size, channels, bits) for size in sizes]
    folder = write(tmp_path_factory.mktemp('a'), pictures)
    found = channel_statistics(folder, None)
    flat = np.concatenate([p.reshape(-1, channels) for p in pictures]).astype(float)
    assert (found.channels, found.bits) == (channels, bits)
    assert (found.pictures, found.pixels) == (len(pictures), len(flat))
    np.testing.assert_allclose(found.mean, flat.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.std, flat.std(0), rtol=1e-9, atol=1e-9)


def test_sums_are_exact_where_float64_sums_are_not(tmp_path, monkeypatch):
    # one level apart, far from 0: a difference of squares in floats loses its digits
    monkeypatch.setattr(statistics, '_PIXELS', 1000)  # several parts a picture
    picture = np.full((300, 400, 1), 65534, np.uint16)
    picture[::3] = 65535
    found = channel_statistics(write(tmp_path / 'a', [picture] * 20))
    assert found.pixels == 20 * 120_000
    assert found.mean == (65534 + 1 / 3,)
    assert found.std == pytest.approx((2**0.5 / 3,), rel=1e-14)
    mean, square = 65534 + 1 / 3, (2 * 65534.0**2 + 65535.0**2) / 3
    assert (square - mean**2) ** 0.5 != pytest.approx(2**0.5 / 3, rel=1e-9)


def test_pictures_are_spread_over_the_folder(tmp_path):
    levels = [np.full((8, 8), i, np.uint8) for i in range(21)]
    folder = write(tmp_path / 'a', levels)
    found = channel_statistics(folder, 5)
    assert found.mean == (np.mean([0, 5, 10, 15, 20]),)
    assert found.std == (np.std([0, 5, 10, 15, 20]),)
    assert found.pictures == 5


def test_broken_pictures_are_named_and_left_out(tmp_path):
    folder = write(tmp_path / 'a', [np.full((8, 8), i, np.uint8) for i in range(4)])
    (folder / '0001.npy').write_bytes(b'')
    found = channel_statistics(folder)
    assert found.broken == (str(folder / '0001.npy'),)
    assert found.pictures == 3 and found.mean == (5 / 3,)
    for path in folder.iterdir():
        path.write_bytes(b'')
    with pytest.raises(DenseSSLError, match='none of 4 pictures can be read'):
        channel_statistics(folder)


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    kinds = [np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9), np.uint8)]
    folder = write(tmp_path / 'a', kinds)
    with pytest.raises(DenseSSLError, match=r'0001.npy.*1 channel of 8 bits, and 3'):
        channel_statistics(folder)
    with pytest.raises(DenseSSLError, match=r'0000.npy.*3 channels of 8 bits, and 4'):
        channel_statistics(folder, channels=4)
    with pytest.raises(DenseSSLError, match='pictures=0'):
        channel_statistics(folder, 0)


def test_a_data_set_is_read_by_its_own_reader(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / 'a'
    folder.mkdir()
    rgb, grey = noise(rng, 8, 9, 3, 8), noise(rng, 10, 7, 1, 8)
    Image.fromarray(rgb).save(folder / 'a.png')
    Image.fromarray(grey[..., 0]).save(folder / 'b.png')
    for lazy in (True, False):
        pipeline = [dict(type='LoadImage', lazy=lazy)]
        found = channel_statistics(UnlabelledImages(str(folder), pipeline=pipeline))
        flat = np.concatenate(
            [rgb.reshape(-1, 3), np.repeat(grey.reshape(-1, 1), 3, 1)]
        )
        np.testing.assert_allclose(found.mean, flat.mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.std, flat.std(0), rtol=1e-12)


@pytest.mark.parametrize('channels', [1, 5])
def test_options_are_those_of_the_command_line(tmp_path, channels):
    rng = np.random.default_rng(0)
    folder = write(tmp_path / 'a', [noise(rng, 9, 9, channels, 16)])
    found = channel_statistics(folder)
    words = found.options.split()
    options = parse_args(['config', '--cfg-options', *words]).cfg_options
    assert options['pictures.channels'] == channels
    assert options['pictures.bits'] == 16
    np.testing.assert_allclose(options['pictures.mean'], found.mean, rtol=1e-5)
    np.testing.assert_allclose(options['pictures.std'], found.std, rtol=1e-5)
    assert isinstance(options['pictures.mean'], list)


def test_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / 'docs/channels.md').read_text()
    (example,) = re.findall(r'```python\n(.+?)```', page, re.DOTALL)
    rng = np.random.default_rng(0)
    write(tmp_path / 'DIR', [noise(rng, 9, 9, 5, 16)])
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == channel_statistics('DIR').options
