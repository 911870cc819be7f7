"""Protocols of whole pictures: planted features, chance, oracles, wrong input."""

from __future__ import annotations

import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from densessl.errors import DenseSSLError
from densessl.evaluation import KNN, FeatureExtractor, LinearClassification, LinearSuite
from densessl.evaluation.knn import knn_classify, nearest
from densessl.evaluation.labelled import (
    CentreCrops,
    LabelledImages,
    pooled_features,
    read_split,
)
from densessl.evaluation.linear_classification import LinearHeads, RandomCrops
from densessl.evaluation.linear_suite import read_label_list
from densessl.models.features import Tokens

SIZE = dict(resize=16, crop=16, num_workers=0)
COLOURS = dict(blue=(20, 20, 230), green=(20, 230, 20), red=(230, 20, 20))


class Means(nn.Module):
    """A token is the mean colour of its patch, or noise that the picture seeds."""

    patch_size = 8

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        self.random = random

    def forward(self, images):
        maps = nn.functional.avg_pool2d(images, 8)
        if self.random:
            seeds = images.double().abs().sum((1, 2, 3)).mul(1e4).long().tolist()
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            maps = [torch.randn(maps.shape[1:], generator=draw) for draw in draws]
            maps = torch.stack(maps)
        return Tokens(maps.flatten(2).mT, tuple(maps.shape[2:]))


def extractor(random=False, **options):
    return FeatureExtractor(Means(random), (128,) * 3, (64,) * 3, **options)


def picture(rng, colour, size=(20, 24)):
    noise = rng.normal(0, 12, (*size, 3)) + colour
    return noise.clip(0, 255).astype(np.uint8)


def make_tree(root, seed=0, **counts):
    """``root/split/colour/i.png``; a colour is a class."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = picture(rng, colour)
                cv2.imwrite(str(folder / f'{i}.png'), image[:, :, ::-1])
    return root


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp('tree'), train=10, val=6)


# Reading


def test_split_is_the_folders(tree):
    train = read_split(tree, 'train')
    assert train.classes == ['blue', 'green', 'red']
    assert train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert train.paths[11].endswith('train/green/1.png')


def test_list_names_the_pictures(tree, tmp_path):
    (tmp_path / 'few.txt').write_text('red/3.png 2\nblue/0.png 0\n')
    few = read_split(tree, 'train', list_file=tmp_path / 'few.txt')
    assert few.labels.tolist() == [2, 0]
    assert few.paths == [f'{tree}/train/{name}.png' for name in ('red/3', 'blue/0')]
    assert few.classes == ['blue', 'green', 'red']


def test_centre_crop_is_the_middle_of_the_resized_picture(tmp_path):
    image = picture(np.random.default_rng(0), (99, 150, 40), size=(64, 40))
    cv2.imwrite(str(tmp_path / 'a.png'), image[:, :, ::-1])
    crop = CentreCrops([str(tmp_path / 'a.png')], 40, 24)[0]
    np.testing.assert_array_equal(crop.permute(1, 2, 0), image[20:44, 8:32])
    half = CentreCrops([str(tmp_path / 'a.png')], 20, 16)[0]
    assert half.shape == (3, 16, 16)
    middle = image[16:48, 4:36].reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(half.permute(1, 2, 0).numpy() - middle).mean() < 5


@pytest.mark.parametrize('batch_size', [1, 7, 64])
def test_features_are_in_the_pictures_order(tree, batch_size):
    train = read_split(tree, 'train')
    crops = CentreCrops(train.paths, 16, 16)
    found = pooled_features(extractor(batch_size=batch_size), crops, 0, 'train')
    pixels = np.stack([crops[i].numpy() for i in range(30)])
    expected = (pixels.mean((2, 3)) - 128) / 64
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_random_crops_depend_on_seed_and_index_alone(tree):
    train = read_split(tree, 'train')
    first, again = (RandomCrops(train, 16, (0, 1)) for _ in range(2))
    _, label = first[5]
    for i in (3, 29, 3):
        assert first[i][0].equal(again[i][0])
    assert not first[3][0].equal(RandomCrops(train, 16, (0, 2))[3][0])
    assert label == 0 and first[29][1] == 2


# k-NN


@pytest.mark.parametrize('k', [1, 5, 40])
def test_votes_are_scikit_learn_s(k, monkeypatch):
    neighbors = pytest.importorskip('sklearn.neighbors')
    monkeypatch.setattr('densessl.evaluation.knn._QUERIES', 13)
    monkeypatch.setattr('densessl.evaluation.knn._BANK', 31)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    bank = rng.normal(size=(200, 6)) + 0.8 * np.eye(4, 6)[labels]
    queries = rng.normal(size=(57, 6))
    theirs = neighbors.KNeighborsClassifier(
        k, metric='cosine', weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank, labels)
    found = knn_classify(
        torch.from_numpy(queries), torch.from_numpy(bank), torch.from_numpy(labels), [k]
    )
    np.testing.assert_array_equal(found[0], theirs.predict(queries))


def test_nearest_is_brute_force_over_any_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(20, 8, generator=g), torch.randn(90, 8, generator=g)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (queries.double(), bank.double())]
    cosine, index = (unit[0] @ unit[1].mT).sort(descending=True)
    for chunks in ((3, 7), (20, 90), (1, 100)):
        monkeypatch.setattr('densessl.evaluation.knn._QUERIES', chunks[0])
        monkeypatch.setattr('densessl.evaluation.knn._BANK', chunks[1])
        found = nearest(queries, 3 * bank, 12)
        assert found[1].equal(index[:, :12])
        torch.testing.assert_close(found[0], cosine[:, :12], atol=1e-6, rtol=0)


def test_small_temperatures_neither_overflow_nor_vanish():
    bank = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    found = knn_classify(bank, bank, labels, [4], 0.005)
    assert found.tolist() == [[0, 0, 1, 1]]


def test_planted_classes_are_found_and_random_ones_are_not(tree, tmp_path):
    scores = KNN(ks=[5, 1], **SIZE).run(extractor(), tree, tmp_path)
    assert scores.metrics == {'top1_5nn': 1.0, 'top1_1nn': 1.0}
    assert scores.settings['num_train'] == 30 and scores.settings['num_val'] == 18
    assert 'num_workers' not in scores.settings
    chance = KNN(ks=[5], **SIZE).run(extractor(random=True), tree, tmp_path)
    assert chance.metrics['top1_5nn'] < 0.75  # 18 draws of 1/3: P(more) < 1e-3


# Linear classification


def test_heads_are_separate_and_follow_sgd_by_hand():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])
    heads = LinearHeads([0.1, 2.0], 3, 3)
    for _ in range(3):
        heads.step(x, y, 6, shared=False)
    for weight, lr in zip(heads.weights, (0.1, 2.0), strict=True):
        w, velocity = torch.zeros(4, 3), torch.zeros(4, 3)
        ones = torch.cat([x, torch.ones(6, 1)], 1)
        for _ in range(3):
            error = (ones @ w).softmax(1) - torch.eye(3)[y]
            velocity = 0.9 * velocity + ones.mT @ error / 6
            w = w - lr * velocity
        torch.testing.assert_close(weight.detach(), w)


def test_a_head_that_diverged_scores_nothing():
    heads = LinearHeads([0.1, 0.1], 2, 3)
    heads.weights[1].data.fill_(float('nan'))
    x, y = torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)
    assert heads.accuracies(x, y).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize('augment', [True, False])
def test_linear_classification_finds_planted_classes(tree, tmp_path, augment):
    options = dict(epochs=3, batch_size=8, lrs=(1e-6, 3.0), augment=augment) | SIZE
    protocol = LinearClassification(**options)
    scores = protocol.run(extractor(), tree, tmp_path)
    assert scores.metrics['top1'] == 1.0
    assert list(scores.metrics) == ['top1', 'best_lr', 'top1_lr_1e-06', 'top1_lr_3']
    again = protocol.run(extractor(), tree, tmp_path)
    assert again == scores
    chance = protocol.run(extractor(random=True), tree, tmp_path)
    assert chance.metrics['top1'] < 0.75


def test_augmentation_and_epochs_change_what_is_learned(tree, tmp_path):
    found = []
    for options in ({}, dict(augment=False), dict(seed=1), dict(epochs=2)):
        taught = []
        step = LinearHeads.step

        def spy(self, features, *args, taught=taught, step=step, **kwargs):
            taught.append(features.sum().item())
            step(self, features, *args, **kwargs)

        options = dict(epochs=1, batch_size=8, lrs=[0.1]) | SIZE | options
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LinearHeads, 'step', spy)
            LinearClassification(**options).run(extractor(), tree, tmp_path)
        found.append(taught)
    assert [len(taught) for taught in found] == [3, 3, 3, 6]
    assert len({tuple(taught[:3]) for taught in found[:3]}) == 3
    assert found[3][:3] == found[0]


# Linear suite


def test_suite_reads_one_set_or_several(tmp_path):
    make_tree(tmp_path / 'pets', train=8, test=4)
    make_tree(tmp_path / 'mine', 1, train=6, val=3, test=4)
    make_tree(tmp_path / 'stl10', 2, train=8, val=4)
    (tmp_path / 'notes').mkdir()
    scores = LinearSuite(**SIZE).run(extractor(), tmp_path, tmp_path)
    assert scores.metrics == dict(
        mean=1.0, mine_accuracy=1.0, pets_mean_per_class=1.0, stl10_accuracy=1.0
    )
    counts = {
        name: tuple(found[f'num_{part}'] for part in ('train', 'val', 'test'))
        for name, found in scores.settings['found'].items()
    }
    assert counts == dict(mine=(18, 9, 12), pets=(18, 6, 12), stl10=(18, 6, 12))
    assert scores.settings['found']['stl10']['split'] == 'val'
    one = LinearSuite(**SIZE).run(extractor(), tmp_path / 'pets', tmp_path)
    assert one.metrics == dict(pets_mean_per_class=1.0)
    chosen = LinearSuite(sets=['stl10'], **SIZE).run(extractor(), tmp_path, tmp_path)
    assert list(chosen.metrics) == ['stl10_accuracy']
    noise = LinearSuite(**SIZE).run(extractor(random=True), tmp_path, tmp_path)
    assert noise.metrics['mean'] < 0.65  # 36 draws of 1/3


def test_suite_reads_lists_with_several_labels(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('test', 12)):
        lines = []
        for i in range(count):
            there = [name for name in COLOURS if rng.random() < 0.5]
            colour = sum((np.array(COLOURS[name]) for name in there), np.zeros(3))
            image = picture(rng, colour.clip(0, 230))
            cv2.imwrite(str(tmp_path / f'{split} {i}.png'), image[:, :, ::-1])
            lines.append('\t'.join([f'{split} {i}.png', *there]))
        (tmp_path / f'{split}.txt').write_text('\n'.join(lines) + '\n')
    protocol = LinearSuite(metric='map_11_point', **SIZE)
    scores = protocol.run(extractor(), tmp_path, tmp_path)
    assert scores.metrics == {f'{tmp_path.name}_map_11_point': pytest.approx(1.0)}


def test_label_list_keeps_difficult_ones_apart(tmp_path):
    for name in 'ab':
        cv2.imwrite(str(tmp_path / f'{name}.png'), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / 'train.txt').write_text('a.png\tdog\t?cat\nb.png\n')
    found = read_label_list(tmp_path, 'train')
    assert isinstance(found, LabelledImages) and found.classes == ['cat', 'dog']
    assert found.labels.tolist() == [[-1, 1], [0, 0]]


# Wrong input


def error_of(call) -> str:
    with pytest.raises(DenseSSLError) as caught:
        call()
    line = str(caught.value)
    assert '\n' not in line
    return line


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda d: (d / 'train').rename(d / 'other'), 'train: no such folder'),
        (lambda d: (d / 'val').rename(d / 'other'), 'val: no such folder'),
        (lambda d: (d / 'train/sky').mkdir(), 'sky: a class without pictures'),
        (lambda d: (d / 'val/sky').mkdir(), 'sky: a class that the training'),
        (
            lambda d: [shutil.rmtree(d / f'train/{name}') for name in COLOURS],
            'no class folders',
        ),
        (lambda d: (d / 'val/red/0.png').write_text('no'), 'val/red/0.png'),
    ],
)
def test_wrong_folders_are_one_line(tmp_path, change, words):
    make_tree(tmp_path, train=2, val=1)
    change(tmp_path)
    assert words in error_of(
        lambda: KNN(ks=[1], **SIZE).run(extractor(), tmp_path, tmp_path)
    )


def test_wrong_settings_are_one_line(tree, tmp_path):
    def run(protocol, data=tree, **options):
        return error_of(lambda: protocol.run(extractor(**options), data, tmp_path))

    assert 'k=31 of 30 training pictures' in run(KNN(ks=[1, 31], **SIZE))
    assert 'ks=[0]' in error_of(lambda: KNN(ks=[0]))
    assert 'temperature=0' in error_of(lambda: KNN(temperature=0))
    small = dict(resize=16, crop=20, num_workers=0)
    assert 'crop=20 px' in run(KNN(ks=[1], **small))
    odd = dict(resize=16, crop=12, num_workers=0)
    assert 'patches of 8 px' in run(KNN(ks=[1], **odd))
    assert 'no class token' in run(KNN(ks=[1], **SIZE), pool='cls')
    assert 'epochs=0' in error_of(lambda: LinearClassification(epochs=0))
    assert 'lrs=[]' in error_of(lambda: LinearClassification(lrs=[]))
    assert "metric='f1'" in error_of(lambda: LinearSuite(metric='f1'))
    assert 'holdout=1' in error_of(lambda: LinearSuite(holdout=1))
    assert 'no train/CLASS/' in run(LinearSuite(sets=['dtd'], **SIZE))
    assert 'no train/CLASS/' in run(LinearSuite(**SIZE), tree / 'train/red')
    assert '3 class(es) for roc_auc' in run(LinearSuite(metric='roc_auc', **SIZE))
    (tmp_path / 'few.txt').write_text('sky/3.png\n')
    assert 'none of the first 1' in run(
        KNN(ks=[1], train_list=tmp_path / 'few.txt', **SIZE)
    )


def test_wrong_lists_are_one_line(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((20, 20, 3), np.uint8))
    path = tmp_path / 'train.txt'

    def run(text, **options):
        path.write_text(text)
        protocol = LinearSuite(**options, **SIZE)
        return error_of(lambda: protocol.run(extractor(), tmp_path, tmp_path))

    assert 'line 2: not exactly one class' in run('a.png\tx\na.png\ty\tx\n')
    assert 'line 1: no such picture' in run('b.png\tx\n')
    assert '1 class(es)' in run('a.png\tx\n')
    (tmp_path / 'test.txt').write_text('a.png\tz\n')
    assert "class 'z' is none" in run('a.png\tx\na.png\ty\n')


def test_diverged_features_are_told_with_their_picture(tree, tmp_path):
    broken = extractor()
    broken.std = broken.std * float('nan')
    protocol = KNN(ks=[1], **SIZE)
    line = error_of(lambda: protocol.run(broken, tree, tmp_path))
    assert 'train/blue/0.png are not finite' in line


# Several processes


def run_all(data, out):
    """Metrics of every protocol, and features of 17 pictures."""
    protocols = (
        KNN(ks=[3], **SIZE),
        LinearClassification(epochs=2, batch_size=7, lrs=(1e-3,), **SIZE),
        LinearSuite(**SIZE),
    )
    door = extractor(batch_size=4)
    metrics = [protocol.run(door, data, out).metrics for protocol in protocols]
    crops = CentreCrops(read_split(data, 'val').paths[:17], 16, 16)
    return metrics, pooled_features(door, crops, 0, 'val')


def worker(rank, data, out):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1'
    )
    torch.set_num_threads(1)
    store = f'file://{out}/store'
    torch.distributed.init_process_group('gloo', store, rank=rank, world_size=2)
    torch.save(run_all(data, out), out / f'rank{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_two_processes_find_what_one_finds(tree, tmp_path):
    torch.multiprocessing.spawn(worker, (tree, tmp_path), nprocs=2)
    metrics, features = run_all(tree, tmp_path)
    for rank in range(2):
        their_metrics, their_features = torch.load(tmp_path / f'rank{rank}.pt')
        assert their_metrics == [pytest.approx(found) for found in metrics]
        torch.testing.assert_close(their_features, features)
