"""What patch dropping keeps, how often, and what the algorithm makes of it."""

import itertools

import pytest
import torch
from conftest import build_model, loca_config, model_config, views

from densessl.errors import DenseSSLError
from densessl.models import PatchDrop
from densessl.registry import TASK_UTILS


@pytest.mark.parametrize(
    ('keep', 'grid', 'count'),
    [(70, (14, 14), 70), (1.0 - 0.8, (14, 14), 39), (0.3, (2, 5), 3), (0, (3, 3), 0)],
)
@pytest.mark.parametrize('kind', ['random', 'run', 'block'])
def test_counts(keep, grid, count, kind):
    drop = TASK_UTILS.build(dict(type='PatchDrop', keep=keep, kind=kind))
    index = drop(grid, 3)
    assert index.shape == (3, count)
    assert (index.diff(dim=1) > 0).all()  # ascending, none twice
    assert count == 0 or 0 <= index.min() <= index.max() < grid[0] * grid[1]


def draws(count=4000, **options):
    """Sets of kept patches of a 3 x 4 grid, one an image."""
    torch.manual_seed(0)
    drop = PatchDrop(**options, per_image=True)
    return [tuple(row) for row in drop((3, 4), count).tolist()]


def test_random_keeps_each_set_equally_often():
    found = draws(keep=2)
    sets = list(itertools.combinations(range(12), 2))
    shares = torch.tensor([found.count(s) / len(found) for s in sets])
    torch.testing.assert_close(shares, torch.full((66,), 1 / 66), rtol=0, atol=0.01)


def test_a_run_is_consecutive_and_starts_anywhere():
    found = draws(keep=5, kind='run')
    expected = {tuple(range(start, start + 5)) for start in range(8)}
    assert set(found) == expected
    assert all(abs(found.count(s) / len(found) - 1 / 8) < 0.03 for s in expected)


def test_a_block_is_a_rectangle_anywhere():
    assert set(draws(keep=4, kind='block')) == {
        (i, i + 1, i + 4, i + 5) for i in (0, 1, 2, 4, 5, 6)
    }
    # five patches: two rows of three, the last of them short
    assert set(draws(keep=5, kind='block')) == {
        (i, i + 1, i + 2, i + 4, i + 5) for i in (0, 1, 4, 5)
    }
    assert set(draws(keep=12, kind='block')) == {tuple(range(12))}


@pytest.mark.parametrize('h', range(1, 6))
@pytest.mark.parametrize('w', range(1, 6))
def test_a_block_of_any_size_fits_any_grid(h, w):
    for keep in range(h * w + 1):
        index = PatchDrop(keep, 'block')((h, w), 1)[0]
        assert len(set(index.tolist())) == keep
        assert keep == 0 or index.max() < h * w


@pytest.mark.parametrize('kind', ['random', 'run', 'block'])
def test_one_draw_for_all_images_or_one_each(kind):
    torch.manual_seed(0)
    shared = PatchDrop(4, kind)
    first, second = shared((6, 6), 20), shared((6, 6), 20)
    assert first.eq(first[0]).all() and not first.equal(second)
    each = PatchDrop(4, kind, per_image=True)((6, 6), 20)
    assert len({tuple(row) for row in each.tolist()}) > 5


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(keep=-1), 'keep=-1'),
        (dict(keep=1.5), r'keep=1.5; give a number of patches, or a share'),
        (dict(keep=3, kind='rows'), "unknown kind 'rows'; choose random, run or block"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(DenseSSLError, match=words):
        PatchDrop(**options)


def test_more_kept_patches_than_there_are():
    drop = dict(local=dict(type='PatchDrop', keep=10))
    model = build_model(**loca_config(drop=drop))
    with pytest.raises(DenseSSLError, match=r'keep=10, but a grid of 3 x 3 has 9'):
        model(**model.data_preprocessor(views()))


def view_config(**options):
    """DINO alone on the ViT of the tests."""
    head = model_config()['heads']['view']
    return dict(heads=dict(view=head), neck=dict(type='AveragePoolNeck')) | options


@pytest.mark.parametrize('after', [False, True])
def test_students_of_other_methods_drop_patches_too(after):
    drop = dict(type='PatchDrop', keep=5, kind='run', after_encoder=after)
    model = build_model(**view_config(drop={'global': drop}))
    batch = model.data_preprocessor(views())
    torch.manual_seed(3)
    student = model._features(model, batch['inputs'], None)
    teacher = model._features(model.teacher, batch['inputs'], None)
    kept = student.kept['global']
    assert kept.shape == (2, 4, 5) and not teacher.kept
    images = batch['inputs']['global'].flatten(0, 1)
    index = kept.flatten(0, 1)
    if after:
        every = model.backbone(images).patches
        expected = torch.stack([x[i] for x, i in zip(every, index, strict=True)])
    else:
        expected = model.backbone(images, keep=index).patches
    torch.testing.assert_close(student.tokens['global'].flatten(0, 1), expected)
    torch.testing.assert_close(student.pooled[:2].flatten(0, 1), expected.mean(1))
    assert teacher.tokens['global'].shape[2] == 16
    assert student.tokens['local'].shape[2] == 9
    assert model(**batch)['loss'].isfinite()


def test_after_the_encoder_works_on_any_backbone():
    swin = dict(
        type='SwinTransformer',
        arch=dict(embed_dims=16, depths=[1], num_heads=[1]),
        img_size=32,
        window_size=4,
    )
    drop = dict(type='PatchDrop', keep=5)
    options = view_config(backbone=swin)
    with pytest.raises(DenseSSLError, match=r'need a VisionTransformer.*after_encoder'):
        build_model(**options, drop={'local': drop})
    model = build_model(**options, drop={'local': drop | dict(after_encoder=True)})
    batch = model.data_preprocessor(views())
    student = model._features(model, batch['inputs'], None)
    assert student.tokens['local'].shape[2] == 5
    assert model(**batch)['loss'].isfinite()


def test_heads_that_need_every_patch_say_so():
    drop = dict(local=dict(type='PatchDrop', keep=5))
    with pytest.raises(DenseSSLError, match=r"'selfpatch' needs every patch.*local"):
        build_model(drop=drop)


@pytest.mark.parametrize(
    'change',
    [
        dict(drop=dict(focal=dict(type='PatchDrop', keep=5))),
        dict(no_positions=['focal']),
    ],
)
def test_a_role_that_is_not_there(change):
    model = build_model(**view_config(**change))
    with pytest.raises(DenseSSLError, match=r'name focal, but the views are global'):
        model(**model.data_preprocessor(views()))


def test_views_without_positions():
    model = build_model(**view_config(no_positions=['local']))
    batch = model.data_preprocessor(views())
    student = model._features(model, batch['inputs'], None)
    images = batch['inputs']['local'].flatten(0, 1)
    found = student.tokens['local'].flatten(0, 1)
    torch.testing.assert_close(found, model.backbone(images, positions=False).patches)
    assert not found.allclose(model.backbone(images).patches)
    table = model.backbone.pos_embed.data.clone()
    model.backbone.pos_embed.data.zero_()
    torch.testing.assert_close(found, model.backbone(images).patches)
    model.backbone.pos_embed.data = table
    teacher = model._features(model.teacher, batch['inputs'], None)
    torch.testing.assert_close(
        teacher.tokens['local'].flatten(0, 1), model.teacher.backbone(images).patches
    )
