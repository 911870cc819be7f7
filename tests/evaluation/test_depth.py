from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from planted import extractor, write

from densessl.errors import DenseSSLError
from densessl.evaluation.depth import (
    DepthEstimation,
    depth_sheet,
    error_sums,
    read_depth,
)
from densessl.evaluation.depth_heads import DPTDepthHead, depth_head
from densessl.evaluation.training_features import keep_features

SIZE = (32, 48)


def _protocol(**options):
    options = dict(size=SIZE, epochs=60, batch_size=8, lr=0.03, train_size=16) | options
    return DepthEstimation(**options)


def _planted(num, seed):
    """The redder a picture, the farther away all of it: 1 to 20 m."""
    rng = np.random.default_rng(seed)
    for red in rng.integers(0, 256, num):
        image = np.full((*SIZE, 3), 90, np.uint8)
        image[..., 0] = red
        depth = np.full(SIZE, np.expm1(np.log(2) + red / 255 * np.log(21 / 2)))
        yield image, depth


def _blind(num, seed):
    rng = np.random.default_rng(seed + 1000)
    for _, depth in _planted(num, seed):
        yield rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8), depth


def _write(data, samples=_planted, kind='png', train=24, val=8):
    for split, num, seed in (('train', train, 0), ('val', val, 1)):
        for i, (image, depth) in enumerate(samples(num, seed)):
            write(data / 'images' / split / f'p{i:02d}.png', image)
            path = data / 'depth' / split / f'p{i:02d}.{kind}'
            if kind == 'png':
                write(path, (depth * 256).round().astype(np.uint16))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, depth)
    return data


def test_metrics_by_hand():
    true = torch.tensor([[1.0, 2.0, 4.0, 0.0], [10.0, 10.0, 0.0, 10.0]])
    pred = torch.tensor([[1.0, 2.3, 3.3, 9.9], [12.4, 9.2, 0.1, 15.7]])
    sums = error_sums(pred, true)
    # ratios: 1, 1.15, 1.212..., 1.24, 1.087, 1.57
    squares = 0.3**2 + 0.7**2 + 2.4**2 + 0.8**2 + 5.7**2
    relative = 0.15 + 0.175 + 0.24 + 0.08 + 0.57
    expected = [6, squares, relative, 2, 5, 5]
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    parts = error_sums(pred[:1], true[:1]) + error_sums(pred[1:], true[1:])
    torch.testing.assert_close(parts, sums)


def test_thresholds_are_symmetric_and_strict():
    ratio = torch.tensor([1.1, 1.25, 1.25**2], dtype=torch.float64)
    for pred, true in ((ratio, torch.ones(3)), (torch.ones(3), ratio)):
        assert error_sums(pred, true)[3:].tolist() == [0, 1, 2]


@pytest.mark.parametrize(('head', 'kind'), [('linear', 'png'), ('dpt', 'npy')])
def test_planted_depth_is_learned(tmp_path, head, kind):
    data = _write(tmp_path, kind=kind)
    options = dict(
        linear=dict(lr=0.03), dpt=dict(lr=3e-3, epochs=25, batch_size=6, size=(8, 16))
    )[head]
    protocol = _protocol(head=head, **options)
    scores = protocol.run(extractor(), data, tmp_path / 'out')
    assert scores.metrics['abs_rel'] < 0.05
    assert scores.metrics['delta_1.1'] > 0.9
    assert scores.metrics['delta_1.25^2'] > 0.99
    assert next(iter(scores.metrics)) == 'mse_m2' and scores.metrics['mse_m2'] < 0.5
    assert scores.settings['num_pixels'] == 8 * math.prod(protocol.size)
    json.dumps(scores.settings)
    assert len(scores.pictures) == 8 and scores.pictures[0].is_file()


def test_tokens_that_know_nothing_score_like_a_constant(tmp_path):
    data = _write(tmp_path, _blind, train=60, val=40)
    metrics = _protocol(epochs=10).run(extractor(), data, tmp_path).metrics
    train = np.log1p([depth[0, 0] for _, depth in _planted(60, 0)]).mean()
    true = np.array([depth[0, 0] for _, depth in _planted(40, 1)])
    constant = (np.abs(np.expm1(train) - true) / true).mean()
    assert metrics['abs_rel'] == pytest.approx(constant, rel=0.1)
    assert metrics['abs_rel'] > 0.5


def test_unknown_pixels_count_nowhere(tmp_path):
    def holed(num, seed):
        for image, depth in _planted(num, seed):
            image[:8] = 255 - image[:8]  # wrong, and bilinear carries it to row 12
            depth[:12] = 0
            yield image, depth

    scores = _protocol().run(extractor(), _write(tmp_path, holed), tmp_path)
    assert scores.metrics['delta_1.1'] > 0.9
    assert scores.settings['num_pixels'] == 8 * 20 * 48


def test_linear_head_trains_towards_least_squares():
    """Full batches for long: the weights of the normal equations."""
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randn(40, 4, 3, generator=gen)
    noise = 0.1 * torch.randn(40, 4, generator=gen)
    target = 1 + tokens @ torch.tensor([0.2, -0.1, 0.05]) + noise
    depth = target.clamp_min(0.1).expm1().view(40, 2, 2)
    protocol = _protocol(epochs=400, batch_size=40, lr=0.02, weight_decay=0.0)
    features = keep_features(tokens, (2, 2), depth)
    reader = protocol.learn(features, 'cpu')
    x = ((tokens.double() - features.shift) / features.scale).flatten(0, 1).numpy()
    x = np.concatenate([x, np.ones((160, 1))], 1)
    best = np.linalg.lstsq(x, depth.double().log1p().flatten().numpy(), rcond=None)[0]
    np.testing.assert_allclose(
        reader.head.weight.flatten().detach(), best[:3], atol=1e-3
    )
    bias = (reader.offset + reader.head.bias).item()
    assert bias == pytest.approx(best[3], abs=1e-3)


def test_seed_alone_decides(tmp_path):
    data = _write(tmp_path, train=6, val=2)
    state = torch.get_rng_state()
    runs = [
        _protocol(head='dpt', epochs=1, lr=1e-3, seed=s).run(
            extractor(), data, tmp_path
        )
        for s in (0, 0, 1)
    ]
    assert runs[0].metrics == runs[1].metrics != runs[2].metrics
    assert torch.equal(torch.get_rng_state(), state)


def test_streamed_features_score_as_cached_ones(tmp_path):
    data = _write(tmp_path, train=8, val=2)
    cached = _protocol(epochs=3).run(extractor(), data, tmp_path).metrics
    streamed = _protocol(epochs=3, cache='none').run(extractor(), data, tmp_path)
    assert streamed.metrics == pytest.approx(cached, rel=1e-3)


@pytest.mark.parametrize(
    ('layers', 'level_of'), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3])]
)
def test_dpt_levels_take_their_layer_at_their_scale(layers, level_of):
    torch.manual_seed(0)
    head = DPTDepthHead(channels=3 * layers, layers=layers, width=8)
    seen, sizes = {}, []
    for i in range(4):
        head.project[i].register_forward_pre_hook(
            lambda _, inputs, i=i: seen.update({i: inputs[0]})
        )
        head.level[i].register_forward_pre_hook(
            lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:]))
        )
    maps = torch.randn(2, 3 * layers, 4, 6)
    assert head(maps).shape == (2, 1, 16, 24)
    for i, layer in enumerate(level_of):
        assert torch.equal(seen[i], maps[:, 3 * layer : 3 * layer + 3])
    assert sizes == [(2, 3), (4, 6), (8, 12), (16, 24)]


def test_every_weight_of_the_dpt_head_has_a_gradient():
    torch.manual_seed(0)
    head = depth_head('dpt', 8, 2)
    head(torch.randn(2, 8, 3, 5)).square().mean().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_depth_of_both_kinds_is_in_metres(tmp_path):
    depth = np.array([[0, 1.5], [2.25, 80]])
    write(tmp_path / 'd.png', (depth * 256).astype(np.uint16))
    np.save(tmp_path / 'd.npy', depth)
    for path in (tmp_path / 'd.png', tmp_path / 'd.npy'):
        np.testing.assert_array_equal(read_depth(path, 256), depth.astype(np.float32))


@pytest.mark.parametrize(
    ('name', 'content', 'found'),
    [
        ('a.npy', np.array([[1.0, -1.0]]), 'negative or not finite'),
        ('a.npy', np.array([[1.0, np.nan]]), 'negative or not finite'),
        ('a.npy', np.ones((2, 2, 1)), r'float64 \(2, 2, 1\); give depth \(H, W\)'),
        ('a.npy', np.array([['x']]), r'give depth \(H, W\)'),
        ('a.npy', b'nothing', 'not an array'),
        ('a.png', b'nothing', 'not a picture'),
        ('a.png', np.zeros((4, 4, 3), np.uint8), 'has colours'),
    ],
)
def test_wrong_maps_are_told_in_one_line(tmp_path, name, content, found):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith('png'):
        write(path, content)
    else:
        np.save(path, content)
    with pytest.raises(DenseSSLError, match=found) as caught:
        read_depth(path, 256)
    assert '\n' not in str(caught.value)


def test_wrong_data_is_told_in_one_line(tmp_path):
    def run(**options):
        with pytest.raises(DenseSSLError) as caught:
            _protocol(epochs=1, **options).run(extractor(), tmp_path, tmp_path)
        assert '\n' not in str(caught.value)
        return str(caught.value)

    assert 'images/train: no such folder' in run()
    _write(tmp_path, train=2, val=2)
    assert 'images/test: no such folder' in run(val_split='test')
    for i in range(2):
        write(tmp_path / f'depth/val/p{i:02d}.png', np.zeros(SIZE, np.uint16))
    assert 'depth/val: no pixel has a depth' in run()
    write(tmp_path / 'depth/train/p01.png', np.ones((8, 8), np.uint16))
    assert 'labels of 8x8 px' in run()
    for i in range(2):
        write(tmp_path / f'depth/train/p{i:02d}.png', np.zeros(SIZE, np.uint16))
    assert 'training depth: no pixel has a depth' in run()
    (tmp_path / 'depth/train/p00.png').unlink()
    assert "such as 'p00'" in run()


def test_wrong_settings_are_told():
    with pytest.raises(DenseSSLError, match="head 'mlp' is unknown"):
        _protocol(head='mlp')
    with pytest.raises(DenseSSLError, match='units_per_m=0'):
        _protocol(units_per_m=0)


def test_sheet_shows_unknown_pixels_black():
    true = np.ones((4, 6), np.float32)
    true[:2] = 0
    sheet = depth_sheet(np.full((4, 6, 3), 7, np.uint8), true, np.ones_like(true))
    assert sheet.shape == (4, 18, 3)
    assert (sheet[:, :6] == 7).all() and (sheet[:2, 6:12] == 0).all()
    assert (sheet[2:, 6:12] == sheet[2:, 12:]).all() and sheet[2:, 6:].any()
