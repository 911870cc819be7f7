"""Demo scenes in COCO format, as pycocotools reads them."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from densessl.datasets import DemoScenes
from densessl.datasets.demo_coco import main, run_lengths

SIZE, SEED, COUNTS = 96, 5, dict(train=6, val=4)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('coco')
    options = dict(out=out, size=SIZE, seed=SEED, **COUNTS)
    assert main([f'--{key}={value}' for key, value in options.items()]) == 0
    return out


@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_run_lengths_go_down_the_columns(mask):
    found = run_lengths(mask)
    assert found['size'] == list(mask.shape) and all(found['counts'][1:])
    value, pixels = False, []
    for count in found['counts']:
        pixels += [value] * count
        value = not value
    height, width = mask.shape
    for i, inside in enumerate(pixels):
        assert mask[i % height, i // height] == inside
    assert len(pixels) == height * width


@pytest.mark.parametrize(('split', 'seed'), [('train', SEED), ('val', SEED + 1)])
def test_annotations_are_the_things_of_the_scenes(folder, split, seed):
    coco = pytest.importorskip(
        'pycocotools.coco', reason='pycocotools is not installed'
    )
    data = coco.COCO(folder / f'annotations/instances_{split}.json')
    scenes = DemoScenes(COUNTS[split], SIZE, seed)
    assert sorted(data.getImgIds()) == list(range(COUNTS[split]))
    assert len(data.anns) == len(data.dataset['annotations'])  # ids are unique
    for image in data.loadImgs(data.getImgIds()):
        scene = scenes.scene(image['id'])
        picture = cv2.imread(str(folder / split / image['file_name']))
        assert (picture[..., ::-1] == scene.image).all()
        assert (image['height'], image['width']) == picture.shape[:2]
        rest = scene.instances.copy()
        for instance in data.loadAnns(data.getAnnIds([image['id']])):
            mask = data.annToMask(instance).astype(bool)
            (number,) = np.unique(scene.instances[mask])
            assert number > 0 and (mask == (scene.instances == number)).all()
            rest[mask] = 0
            (name,) = data.loadCats(instance['category_id'])
            assert name['name'] == DemoScenes.CLASSES[scene.labels[mask][0]]
            rows, cols = np.nonzero(mask)
            box = [cols.min(), rows.min(), np.ptp(cols) + 1, np.ptp(rows) + 1]
            assert instance['bbox'] == box
            assert instance['area'] == mask.sum() and not instance['iscrowd']
        assert not rest.any()  # each thing has its annotation
        assert len(data.getAnnIds([image['id']])) == len(np.unique(scene.instances)) - 1


def test_categories_are_the_six_things(folder):
    data = json.loads((folder / 'annotations/instances_val.json').read_text())
    names = [category['name'] for category in data['categories']]
    assert names == ['ball', 'crate', 'ring', 'star', 'kite', 'leaf']
    assert [category['id'] for category in data['categories']] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--val', '0'], 'length=0 is too small'),
        (['--size', '16'], 'size=16 is too small'),
        (['--out', '{file}/below'], 'cannot write'),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path, capsys, options, words):
    (tmp_path / 'file').touch()
    options = [option.format(file=tmp_path / 'file') for option in options]
    assert main(['--out', str(tmp_path), '--train', '1', '--size', '32', *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line
