from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densessl.errors import DenseSSLError
from densessl.evaluation.features import FeatureExtractor
from densessl.models.features import Tokens
from densessl.visualization import (
    pca_colours,
    pca_image,
    principal_components,
    read_scalars,
    save_curves,
    save_pca,
)
from densessl.visualization.main import main as visualize

GRID = (4, 6)


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pictures(n=2, height=32, width=48):
    shape = (n, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


# Components


def test_three_planted_factors_are_found_up_to_an_affine_map():
    factors = _random(3, 24, 3).double() * torch.tensor([5.0, 2.0, 1.0])
    tokens = factors @ _random(3, 16, seed=1).double() + _random(16, seed=2)
    found = principal_components(tokens).flatten(0, 1)
    design = torch.cat([found, torch.ones(len(found), 1)], 1)
    solution = torch.linalg.lstsq(design, factors.flatten(0, 1)).solution
    torch.testing.assert_close(design @ solution, factors.flatten(0, 1))


def test_components_are_the_leading_singular_vectors():
    tokens = _random(2, 50, 8) * torch.linspace(1, 4, 8) + 10
    found = principal_components(tokens).flatten(0, 1)
    flat = tokens.double().flatten(0, 1)
    left, values, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    expected = left[:, :3] * values[:3]
    torch.testing.assert_close(found.abs(), expected.abs())
    torch.testing.assert_close(found.mT @ found, torch.diag(values[:3] ** 2))


def test_signs_are_stable_and_stated():
    tokens = _random(2, 50, 8).double()
    found = principal_components(tokens)
    for seed in range(5):
        noise = 1e-9 * _random(2, 50, 8, seed=seed)
        torch.testing.assert_close(
            principal_components(tokens + noise), found, atol=1e-6, rtol=0
        )
    flat = tokens.flatten(0, 1) - tokens.flatten(0, 1).mean(0)
    vectors = torch.linalg.lstsq(found.flatten(0, 1), flat).solution  # (3, 8)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_pictures_share_one_basis():
    first = _random(24, 8)
    second = torch.cat([first[12:], 5 * _random(12, 8, seed=1)])
    colours = pca_colours(torch.stack([first, second]))
    assert torch.equal(colours[0, 12:], colours[1, :12])
    alone = pca_colours(first[None])
    assert not torch.equal(alone[0], colours[0])  # the other picture has its say


def test_an_outlier_does_not_darken_the_rest():
    tokens = _random(4, 100, 8)
    tokens[0, 0] = 1e4
    colours = pca_colours(tokens).flatten(0, 1)[1:].int()
    spread = colours.amax(0) - colours.amin(0)
    assert (spread > 200).all()


def test_collapsed_features_are_grey():
    rounding = 1e-7 * _random(2, 24, 8)
    assert (pca_colours(3.0 * (1 + rounding)) == 128).all()
    line = torch.linspace(0, 1, 24)[None, :, None] * torch.ones(8)
    colours = pca_colours(line)  # one factor only: red runs, green and blue rest
    assert colours[0, :, 0].unique().numel() > 20
    assert (colours[..., 1:] == 128).all()


def test_features_of_few_channels_leave_the_other_colours_grey():
    assert (pca_colours(_random(2, 24, 2))[..., 2] == 128).all()


def test_features_that_are_not_finite_are_told():
    tokens = _random(1, 24, 8)
    tokens[0, 3, 1] = torch.nan
    with pytest.raises(DenseSSLError, match='not all finite'):
        pca_colours(tokens)


# Sheets


def test_sheet_shows_each_picture_beside_its_patches():
    images, tokens = _pictures(), _random(2, 24, 8)
    sheet = pca_image(tokens, GRID, images, cell_px=48)
    assert sheet.shape == (4 + 2 * (32 + 4), 4 + 2 * (48 + 4), 3)
    colours = pca_colours(tokens).view(2, *GRID, 3).numpy()
    for row, y in enumerate((4, 40)):
        np.testing.assert_array_equal(sheet[y : y + 32, 4:52], images[row])
        patches = sheet[y : y + 32, 56:104].reshape(4, 8, 6, 8, 3)
        np.testing.assert_array_equal(
            patches, colours[row][:, None, :, None].repeat(8, 1).repeat(8, 3)
        )
    edges = np.concatenate(
        [sheet[:4].ravel(), sheet[36:40].ravel(), sheet[:, 52:56].ravel()]
    )
    assert (edges == 255).all()


def test_pictures_stand_side_by_side_on_request():
    images, tokens = _pictures(3), _random(3, 24, 8)
    sheet = pca_image(list(tokens), GRID, images, cell_px=48, per_row=2)
    assert sheet.shape == (4 + 2 * 36, 4 + 4 * 52, 3)
    np.testing.assert_array_equal(sheet[4:36, 108:156], images[1])
    np.testing.assert_array_equal(sheet[40:72, 4:52], images[2])
    assert (sheet[40:72, 108:] == 255).all()  # no fourth picture


def test_cells_keep_the_aspect_and_upsampling_is_a_choice():
    images, tokens = _pictures(1, 64, 32), _random(1, 32, 8)
    sharp = pca_image(tokens, (8, 4), images, cell_px=100)
    smooth = pca_image(tokens, (8, 4), images, cell_px=100, upsample='bicubic')
    assert sharp.shape == smooth.shape == (108, 4 + 2 * 54, 3)
    colours = {tuple(pixel) for pixel in pca_colours(tokens)[0].tolist()}
    cell = slice(4, 104), slice(58, 108)
    assert {tuple(p) for p in sharp[cell].reshape(-1, 3).tolist()} == colours
    assert len(np.unique(smooth[cell].reshape(-1, 3), axis=0)) > 10 * len(colours)


def test_networks_stand_beside_each_other_under_titles():
    images = _pictures()
    untrained, trained = _random(2, 24, 8), _random(2, 24, 8, seed=1)
    both = {'untrained': untrained, 'trained': trained}
    sheet = pca_image(both, GRID, images, cell_px=48)
    assert sheet.shape == (4 + 18 + 2 * 36, 4 + 3 * 52, 3)
    for column, tokens in enumerate((untrained, trained), start=1):
        alone = pca_image(tokens, GRID, images, cell_px=48)[4:, 56:104]
        x = 4 + 52 * column
        np.testing.assert_array_equal(sheet[22:, x : x + 48], alone)
        assert (sheet[:18, x : x + 48] < 128).any()  # ink of the title
    assert (sheet[18:22] > 128).all()


@pytest.mark.parametrize(
    ('tokens', 'images', 'found'),
    [
        (_random(2, 23, 8), _pictures(), r'\(2, 23, 8\) .* 2 pictures of 4x6 patches'),
        (_random(3, 24, 8), _pictures(), r'\(3, 24, 8\) .* 2 pictures'),
        (_random(2, 24, 8), [_pictures()[0], _pictures()[1][:8]], 'of one size'),
        (_random(2, 24, 8), _pictures().astype(np.float32), 'float32'),
        (_random(2, 24, 8), [], 'one or more'),
    ],
)
def test_wrong_sheets_are_told_in_one_line(tokens, images, found):
    with pytest.raises(DenseSSLError, match=found) as caught:
        pca_image(tokens, GRID, images)
    assert '\n' not in str(caught.value)


class Pooled(nn.Module):
    patch_size = 8

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, images):
        maps = F.avg_pool2d(images, 8)
        return Tokens((maps.flatten(2).mT * self.gain).sin(), tuple(maps.shape[2:]))


def _read_rgb(path):
    return cv2.imread(str(path))[:, :, ::-1]


def test_saved_sheet_is_the_sheet(tmp_path):
    images = _pictures()
    plain, wild = (
        FeatureExtractor(Pooled(gain), (128.0,) * 3, (64.0,) * 3) for gain in (1, 30)
    )
    path = tmp_path / 'new' / 'pca.png'
    save_pca(path, plain, images, cell_px=48)
    expected = pca_image(plain(images).patches, GRID, images, cell_px=48)
    np.testing.assert_array_equal(_read_rgb(path), expected)

    save_pca(path, {'a': plain, 'b': wild}, list(images), upsample='bicubic', per_row=2)
    tokens = {'a': plain(images).patches, 'b': wild(images).patches}
    expected = pca_image(tokens, GRID, images, upsample='bicubic', per_row=2)
    np.testing.assert_array_equal(_read_rgb(path), expected)


# Curves


def _line(step, **changes):
    entry = {
        'base_lr': 1.0,
        'lr': 1e-4 * step,
        'data_time': 0.1,
        'loss': 9.0 - 0.1 * step,
        'loss_view': 8.0 - 0.1 * step,
        'view_teacher_entropy': 5.0 + np.sin(step),
        'view_kl': 0.1 * np.cos(step),
        'weight_decay': 0.04,
        'teacher_momentum': 0.996 + 1e-4 * step,
        'epoch': 1,
        'iter': step,
        'step': step,
    }
    return {**entry, **changes}


def _log(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


def test_scalars_are_read_by_name(tmp_path):
    lines = [
        _line(10),
        {'train/grad_norm': 3.0, 'step': 10},
        {'note': 'text', 'step': 10},
        {'accuracy': 0.5},
        _line(20, loss=float('nan'), loss_view=float('inf')),
    ]
    path = _log(tmp_path / 'scalars.json', lines)
    with path.open('a') as file:
        file.write('{"loss": 7.0, "ste')  # killed while writing
    series = read_scalars(path)
    steps, losses = series['loss']
    assert steps == [10, 20]
    assert losses[0] == 8.0 and np.isnan(losses[1])
    assert np.isnan(series['loss_view'][1][1])
    assert series['grad_norm'] == ([10], [3.0])
    assert series['lr'] == ([10, 20], [1e-4 * 10, 1e-4 * 20])
    assert 'note' not in series and 'accuracy' not in series and 'iter' not in series


def test_a_resumed_run_continues_its_curve(tmp_path):
    first = _log(tmp_path / 'a.json', [_line(10), _line(20), _line(30, loss=99.0)])
    second = _log(tmp_path / 'b.json', [_line(30, loss=1.5), _line(40)])
    steps, losses = read_scalars([first, second])['loss']
    assert steps == [10, 20, 30, 40]
    assert losses == [8.0, 7.0, 1.5, 5.0]


def _drawn(folder, lines):
    save_curves(_log(folder / 'scalars.json', lines), folder / 'out' / 'curves.png')
    image = _read_rgb(folder / 'out' / 'curves.png')
    assert image.shape == (400, 1200, 3)
    return np.split(image, 3, axis=1)


@pytest.mark.parametrize(
    ('panel', 'changes'),
    [
        (0, {'loss': 7.7}),
        (0, {'loss_view': 6.2}),
        (1, {'view_teacher_entropy': 5.5}),
        (1, {'view_kl': 0.05}),
        (2, {'lr': 1.5e-3}),
        (2, {'teacher_momentum': 0.998}),
        (None, {'data_time': 3.0, 'base_lr': 7.0}),
    ],
)
def test_each_number_is_drawn_in_its_panel(tmp_path, monkeypatch, panel, changes):
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)  # no global figures
    steps = range(1, 31)
    plain = _drawn(tmp_path, [_line(step) for step in steps])
    changed = _drawn(tmp_path, [_line(s, **changes if s == 12 else {}) for s in steps])
    differ = [not np.array_equal(a, b) for a, b in zip(plain, changed, strict=True)]
    assert differ == [panel == each for each in range(3)]


def test_range_of_a_schedule_is_on_its_label(tmp_path):
    low = _drawn(tmp_path, [_line(s, lr=1e-6 * s**2) for s in range(1, 31)])
    high = _drawn(tmp_path, [_line(s, lr=1e-5 * s**2) for s in range(1, 31)])
    assert not np.array_equal(low[2], high[2])  # same shape, other numbers
    blue = (low[2][..., 2] > 150) & (low[2][..., 0] < 100)  # lr, far below the others
    assert blue.any(axis=1).sum() > 200  # rows of pixels: it fills its own range


def test_a_single_point_without_monitors_is_seen(tmp_path):
    panels = _drawn(tmp_path, [{'loss': 3.0, 'iter': 1}])
    middle = panels[0][150:250, 150:280]  # where the axes centre a single point
    assert ((middle[..., 2] > 150) & (middle[..., 0] < 100)).any()


def test_missing_and_empty_logs_are_told_in_one_line(tmp_path):
    empty = _log(tmp_path / 'empty.json', [{'lr': 1.0, 'iter': 1}])
    for path, found in ((tmp_path / 'no.json', 'No such file'), (empty, 'no line has')):
        with pytest.raises(DenseSSLError, match=found) as caught:
            save_curves(path, tmp_path / 'curves.png')
        assert '\n' not in str(caught.value)
        assert path.name in str(caught.value)


def test_a_value_of_several_runs_has_a_line_for_each(tmp_path, capsys):
    for run, height in (('low', 1.0), ('high', 3.0)):
        log = tmp_path / run / '20260101' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        entries = [dict(loss=height, iter=i, other=2.0) for i in range(50)]
        log.write_text('\n'.join(map(json.dumps, entries)))
    out = tmp_path / 'plots' / 'two.png'
    folders = [str(tmp_path / 'low'), str(tmp_path / 'high')]
    values = ['--values', 'loss', 'other', '--out', str(out)]
    assert visualize(['curves', *folders, *values]) == 0
    image = cv2.imread(str(out))
    assert image.shape == (400, 800, 3)

    def rows(colour):  # of matplotlib's first two colours, in the panel of the loss
        near = np.abs(image[:, :400].astype(int) - colour).max(-1) < 30
        count = near.sum(1)
        return np.flatnonzero(count > 200)

    first, second = rows((180, 119, 31)), rows((14, 127, 255))
    assert len(first) and len(second) and second.max() < first.min()  # 3 is above 1

    assert visualize(['curves', folders[0], '--values', 'los', '--out', str(out)]) == 2
    assert "no value 'los'; it has, for example, loss" in capsys.readouterr().err
