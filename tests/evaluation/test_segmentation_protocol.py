from __future__ import annotations

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from planted import CLASSES, extractor, noise, stripes, write_split, write_stripes

from densessl.errors import DenseSSLError
from densessl.evaluation.linear_segmentation import linear_segmentation
from densessl.evaluation.mask_pictures import class_colours, evenly, mask_sheet
from densessl.evaluation.segmentation_protocol import LinearSegmentationProtocol
from densessl.registry import EVALUATORS

HEAD = dict(epochs=10, batch_size=5, lr=1.0, train_mask_size=24)


def _protocol(**options):
    options = dict(classes=CLASSES, size=(32, 48), head=HEAD) | options
    return LinearSegmentationProtocol(**options)


def test_tokens_that_spell_the_label_score_one(tmp_path):
    data = write_stripes(tmp_path)
    scores = _protocol().run(extractor(), data, tmp_path)
    names = ['miou', 'pixel_accuracy', 'iou/red', 'iou/green', 'iou/blue']
    assert scores.metrics == dict.fromkeys(names, 1.0)
    assert next(iter(scores.metrics)) == 'miou'
    settings = json.loads(json.dumps(scores.settings))
    assert settings['num_train'] == 24 and settings['num_val'] == 6
    assert settings['head']['epochs'] == 10
    assert settings['head']['weight_decay'] == 1e-4  # a default is told too
    assert settings['classes'] == CLASSES


def test_tokens_that_know_nothing_score_like_chance(tmp_path):
    data = write_stripes(tmp_path, noise, train=40, val=40)
    metrics = _protocol().run(extractor(), data, tmp_path).metrics
    assert metrics['pixel_accuracy'] == pytest.approx(1 / 3, abs=0.06)
    assert metrics['miou'] < 0.25  # a third of the pixels right: 1/5 if spread evenly


def test_score_is_that_of_the_function_on_the_same_samples(tmp_path):
    data = write_stripes(tmp_path, noise)
    scores = _protocol(seed=3).run(extractor(), data, tmp_path)
    samples = list(noise(24, 0)), list(noise(6, 1))
    result = linear_segmentation(extractor(), *samples, 3, seed=3, **HEAD)
    assert scores.metrics['miou'] == result.miou
    assert scores.metrics['pixel_accuracy'] == result.pixel_accuracy
    per_class = [scores.metrics[f'iou/{name}'] for name in CLASSES]
    assert per_class == list(result.per_class)


@pytest.mark.parametrize('batch_size', [3, 64])
def test_streamed_features_score_as_cached_ones(tmp_path, batch_size):
    data = write_stripes(tmp_path, noise, train=12)
    frozen = [extractor(batch_size=batch_size) for _ in range(2)]
    cached = _protocol().run(frozen[0], data, tmp_path).metrics
    streamed = _protocol(cache='none').run(frozen[1], data, tmp_path).metrics
    assert streamed == pytest.approx(cached, abs=1e-3)
    assert frozen[0].backbone.forwards == 12 + 6
    assert frozen[1].backbone.forwards == 12 + 10 * 12 + 6


def test_other_void_labels_do_not_count(tmp_path):
    hidden = []
    for image, mask in stripes(24, 0):
        image[:8] = 255 - image[:8]
        mask[:12] = 11  # bilinear logits carry the spoilt row this far
        hidden.append((image, mask))
    write_split(tmp_path, 'train', hidden)
    write_split(tmp_path, 'val', hidden[:6])
    with pytest.raises(DenseSSLError, match='label 11 is outside'):
        _protocol().run(extractor(), tmp_path, tmp_path)
    scores = _protocol(ignore=[11]).run(extractor(), tmp_path, tmp_path)
    assert scores.metrics['miou'] == 1.0


def test_pictures_show_picture_truth_and_prediction(tmp_path):
    data = write_stripes(tmp_path)
    scores = _protocol(num_pictures=2).run(extractor(), data, tmp_path / 'out')
    assert [path.name for path in scores.pictures] == ['p00.png', 'p05.png']
    ((image, mask), *_) = stripes(6, 1)
    sheet = cv2.imread(str(scores.pictures[0]))[..., ::-1]
    colours = class_colours(3)
    np.testing.assert_array_equal(sheet[:32, :48], image)
    np.testing.assert_array_equal(sheet[:32, 52:100], colours[mask])
    np.testing.assert_array_equal(sheet[:32, 104:152], colours[mask])
    legend = sheet[:, 156:].reshape(-1, 3)
    for colour in colours:
        assert (legend == colour).all(1).any()


def test_sheet_leaves_ignored_pixels_white():
    image = np.zeros((20, 20, 3), np.uint8)
    truth = np.full((20, 20), 255, np.uint8)
    truth[:10] = 1
    sheet = mask_sheet(image, truth, np.ones((20, 20), np.uint8), ['a', 'b'])
    assert (sheet[10:20, 24:44] == 255).all()
    assert (sheet[:10, 24:44] == class_colours(2)[1]).all()


@pytest.mark.parametrize('num', [2, 11, 21, 150])
def test_class_colours_differ(num):
    colours = class_colours(num).tolist()
    assert len({tuple(colour) for colour in colours}) == num
    assert [255, 255, 255] not in colours


def test_pictures_are_chosen_evenly():
    assert evenly(9, 3) == {0, 4, 8}
    assert evenly(2, 8) == {0, 1}
    assert evenly(5, 0) == set()


@pytest.mark.parametrize(
    ('options', 'found'),
    [
        (dict(classes=4), 'train masks .*: no pixel of class 3'),
        (dict(classes=2), r'label 2 is outside 0\.\.1'),
        (dict(classes=1), 'LinearSegmentationProtocol: 1 classes; give 2 to 255'),
        (dict(size=30), '30x30 px do not divide into patches of 8 px'),
        (dict(val_split='test'), 'images/test: no such folder'),
        (dict(cache='disk'), "cache 'disk' is unknown; use one of fp32, fp16, none"),
    ],
)
def test_wrong_settings_are_told_in_one_line(tmp_path, options, found):
    data = write_stripes(tmp_path, train=3, val=2)
    with pytest.raises(DenseSSLError, match=found) as caught:
        _protocol(**options).run(extractor(), data, tmp_path)
    assert '\n' not in str(caught.value)


def test_a_wrong_name_in_the_head_is_told_when_the_protocol_is_built():
    with pytest.raises(TypeError, match="keyword argument 'lrr'"):
        _protocol(head=dict(lrr=1.0))


@pytest.mark.parametrize('cache', ['fp32', 'none'])
def test_features_that_are_not_finite_are_told(tmp_path, cache):
    data = write_stripes(tmp_path, train=3, val=2)
    broken = extractor(batch_size=2)
    broken.backbone.gain = torch.inf
    with pytest.raises(DenseSSLError, match='features of picture 0 are not finite'):
        _protocol(cache=cache).run(broken, data, tmp_path)


@pytest.mark.parametrize(
    ('name', 'classes', 'epochs', 'size'),
    [('voc', 21, 25, 448), ('camvid', 11, 60, [128, 160])],
)
def test_configs_are_the_published_settings(name, classes, epochs, size):
    cfg = Config.fromfile(ROOT / f'configs/evaluation/linear_segmentation_{name}.py')
    protocol = EVALUATORS.build(cfg.protocol)
    linear = protocol.linear()
    assert linear.num_classes == classes and linear.epochs == epochs
    assert protocol.size == size
    if name == 'voc':
        published = dict(lr=0.01, batch_size=60, weight_decay=1e-4, train_mask_size=100)
        assert published.items() <= dataclasses.asdict(linear).items()
        assert protocol.train_split == 'trainaug'


@pytest.mark.parametrize(
    ('name', 'kind', 'classes'),
    [
        ('linear_segmentation', 'LinearSegmentationProtocol', 2),
        ('kmeans_segmentation', 'KMeansSegmentation', 21),
        ('kmeans_segmentation_camvid', 'KMeansSegmentation', 11),
        ('localisation', 'Localisation', 21),
        ('depth', 'DepthEstimation', None),
    ],
)
def test_the_other_configs_build(name, kind, classes):
    cfg = Config.fromfile(ROOT / f'configs/evaluation/{name}.py')
    protocol = EVALUATORS.build(cfg.protocol)
    assert type(protocol).__name__ == kind
    if classes is not None:
        assert len(protocol.names) == classes
