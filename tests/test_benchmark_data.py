"""The benchmark of the input pipeline: made pictures, workers, command line."""

import re

import cv2
import numpy as np
import pytest

from densessl.benchmark import main as command
from densessl.benchmark.data import parse_size, write_noise_jpegs
from densessl.benchmark.workers import run
from densessl.errors import DenseSSLError

VIEWS = [{'role': 'a', 'size': 32, 'scale': (0.4, 1.0), 'count': 2}]
PIPELINE = [{'type': 'LoadImage', 'lazy': True}, {'type': 'MultiCrop', 'views': VIEWS}]


def test_made_pictures_are_like_photographs(tmp_path):
    for size in ((480, 360), (200, 301)):
        path = write_noise_jpegs(tmp_path, count=1, size=size)[0]
        image = cv2.imread(str(path)).astype(float)
        assert image.shape == (size[1], size[0], 3)
        assert 3 < np.abs(np.diff(image, axis=1)).mean() < 8  # CamVid: 4
        assert 0.15 < path.stat().st_size / size[0] / size[1] < 0.45  # bytes a px


def test_workers_deliver():
    rates = run(PIPELINE, [1, 2], seconds=0.3, size=(120, 90))
    assert list(rates) == [1, 2] and min(rates.values()) > 5


def test_command_prints_workers_and_reference(tmp_path, capsys):
    pytest.importorskip('torchvision')
    config = tmp_path / 'config.py'
    config.write_text(f'train_dataloader = dict(dataset=dict(pipeline={PIPELINE}))')
    options = ['data', str(config), '--seconds', '0.3', '--size', '160x120']
    assert command.main([*options, '--workers', '1', '2']) == 0
    out = capsys.readouterr().out
    rates = [float(rate) for rate in re.findall(r'workers: ([0-9.]+) images/s', out)]
    (exponent,) = re.findall(r'exponent (-?[0-9.]+)', out)
    assert float(exponent) == pytest.approx(np.log2(rates[1] / rates[0]), abs=0.02)
    assert command.main([*options, '--reference']) == 0
    assert re.search(r'ratio [0-9.]+', capsys.readouterr().out)
    options += ['--cfg-options', 'train_dataloader.dataset.pipeline.1.augment_on']
    options[-1] += '=here'
    assert command.main(options) == 2
    assert "augment_on='here'" in capsys.readouterr().err  # so it reached MultiCrop


@pytest.mark.parametrize('text', ['1000', '0x5', 'axb', '8x900', '-20x30', '20x30x3'])
def test_bad_sizes(text):
    with pytest.raises(DenseSSLError, match='WIDTHxHEIGHT'):
        parse_size(text)


def test_bad_number_of_workers():
    with pytest.raises(DenseSSLError, match='--workers 0'):
        run(PIPELINE, [1, 0])
    assert parse_size('1000x750') == (1000, 750)
