"""LOCA's positions: pixels of the drawing, and the command that makes it."""

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config

from densessl.datasets import DemoScenes
from densessl.datasets.transforms.multi_crop import resize_crop
from densessl.engine.checkpoint import save_run
from densessl.geometry import ViewGeometry
from densessl.models.heads import PositionHead
from densessl.registry import MODELS
from densessl.visualization import position
from densessl.visualization.main import main
from densessl.visualization.matches import (
    BETWEEN_PX,
    GAP_PX,
    TITLE_PX,
    place_colours,
)
from densessl.visualization.position import EDGE, EDGE_PX, draw_positions, query_box
from densessl.visualization.views import View

GRID, SIZE = (4, 6), (64, 96)  # of the reference: patches of 16 px
QUERY_GRID, QUERY_SIZE = (2, 3), (32, 48)
RIGHT = GAP_PX + SIZE[1] + BETWEEN_PX  # first column of the query
EVERY = np.ones(24, bool)
REFERENCE_BOX = (20, 10, 192, 128)


def geometry(box, size, flip=False):
    return ViewGeometry.from_lists(box, flip, size, (200, 300))


def view(box, size, flip=False, seed=0):
    pixels = np.random.default_rng(seed).integers(30, 256, (*size, 3), np.uint8)
    return View(pixels, geometry(box, size, flip))


def pair(query_box=(52, 42, 96, 64), flips=(False, False)):
    """A reference, and a query in it: 16 to 64 and 16 to 48 px."""
    return (
        view(REFERENCE_BOX, SIZE, flips[0]),
        view(query_box, QUERY_SIZE, flips[1], seed=1),
    )


def draw(views, found=(), visible=EVERY, **options):
    """The two views of the sheet; ``found`` holds a place or None for each patch."""
    found = [*found, *[None] * (6 - len(found))]
    valid = np.array([place is not None for place in found])
    index = np.array([place or 0 for place in found])
    grids = GRID, QUERY_GRID
    sheet = draw_positions(*views, grids, index, valid, visible, **options)
    zoom = options.get('zoom', 1)
    left = sheet[GAP_PX:-GAP_PX, GAP_PX : GAP_PX + zoom * SIZE[1]]
    start = GAP_PX + zoom * SIZE[1] + BETWEEN_PX
    right = sheet[GAP_PX : GAP_PX + zoom * QUERY_SIZE[0], start:-GAP_PX]
    return sheet, left, right


def edge(left, top, right, bottom):
    """Pixels of a frame, `EDGE_PX` wide, inside a box."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    far = np.maximum.reduce([left - x, x - right + 1, top - y, y - bottom + 1])
    return (far <= 0) & (far > -EDGE_PX)


# Drawing


def test_sheet_without_predictions_is_the_views_and_an_outline():
    views = pair()
    sheet, left, right = draw(views)
    assert sheet.shape == (64 + 2 * GAP_PX, RIGHT + 48 + GAP_PX, 3)
    frame = edge(16, 16, 64, 48)
    assert (left[frame] == EDGE).all()
    np.testing.assert_array_equal(left[~frame], views[0].pixels[~frame])
    np.testing.assert_array_equal(right, views[1].pixels)
    rest = sheet.copy()
    rest[GAP_PX:-GAP_PX, GAP_PX : GAP_PX + 96] = 255
    rest[GAP_PX : GAP_PX + 32, RIGHT:-GAP_PX] = 255
    assert (rest == 255).all()


def test_views_themselves_are_not_drawn_on():
    views = pair()
    before = [v.pixels.copy() for v in views]
    draw(views, [3, 4, 5], visible=~EVERY)
    for one, old in zip(views, before, strict=True):
        np.testing.assert_array_equal(one.pixels, old)


@pytest.mark.parametrize('zoom', [1, 3])
def test_each_place_has_a_square_of_its_patchs_colour(zoom):
    # far away, so that no outline is in the way
    views = pair((250, 150, 30, 20))
    colours, cell, margin = place_colours(QUERY_GRID), 16 * zoom, 2 * zoom
    for token in range(6):
        for place in (0, 7, 23):
            found = [None] * 6
            found[token] = place
            _, blank, plain = draw(views, zoom=zoom)
            _, left, right = draw(views, found, zoom=zoom)
            row, column = divmod(place, 6)
            inner = np.zeros(left.shape[:2], bool)
            top, start = row * cell + margin, column * cell + margin
            inner[top : top + 12 * zoom, start : start + 12 * zoom] = True
            assert (left[inner] == colours[token]).all()
            np.testing.assert_array_equal(left[~inner], blank[~inner])
            row, column = divmod(token, 3)
            mine = np.zeros(right.shape[:2], bool)
            mine[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 1
            half = (plain[mine].astype(int) + colours[token]) // 2
            np.testing.assert_array_equal(right[mine], half)
            np.testing.assert_array_equal(right[~mine], plain[~mine])


def test_several_patches_in_one_place_share_it_in_stripes():
    _, left, _ = draw(pair((250, 150, 30, 20)), [None, 9, 8, 9, None, 9])
    colours = place_colours(QUERY_GRID)
    square = left[18:30, 50:62]  # row 1, column 3
    for stripe, token in enumerate((1, 3, 5)):
        assert (square[:, 4 * stripe : 4 * stripe + 4] == colours[token]).all()
    assert (left[18:30, 34:46] == colours[2]).all()


def test_hidden_patches_are_grey_and_others_as_they_were():
    views = pair((250, 150, 30, 20))
    visible = np.random.default_rng(0).random(24) < 0.4
    _, left, right = draw(views, visible=visible)
    shown = np.kron(visible.reshape(GRID), np.ones((16, 16))).astype(bool)
    np.testing.assert_array_equal(left[shown], views[0].pixels[shown])
    assert (np.ptp(left[~shown], axis=1) == 0).all()
    assert np.ptp(views[0].pixels[~shown], axis=1).max() > 100
    assert np.ptp(left[~shown]) < 64  # faded
    np.testing.assert_array_equal(right, views[1].pixels)


@pytest.mark.parametrize('flipped', [False, True])
@pytest.mark.parametrize(
    'box', [(52, 42, 96, 64), (0, 0, 90, 70), (100, 60, 180, 120), (10, 5, 250, 160)]
)
def test_outline_is_where_the_reference_shows_the_query(box, flipped):
    # the query's part of a black source, cut as the reference is
    source = np.zeros((200, 300, 3), np.uint8)
    x, y, width, height = box
    source[y : y + height, x : x + width] = 255
    white = resize_crop(source, REFERENCE_BOX, SIZE)[..., 0] > 127
    if flipped:
        white = white[:, ::-1]
    reference = geometry(REFERENCE_BOX, SIZE, flipped)
    for query_flipped in (False, True):
        query = geometry(box, QUERY_SIZE, query_flipped)
        left, top, right, bottom = query_box(reference, query, SIZE)
        y, x = np.mgrid[: SIZE[0], : SIZE[1]]
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        np.testing.assert_array_equal(inside, white)
        # and no edge is drawn where the query goes on outside of the reference
        _, picture, _ = draw(pair(box, (flipped, query_flipped)))
        np.testing.assert_array_equal(
            (picture == EDGE).all(-1), edge(left, top, right, bottom)
        )


# The command


TINY = f"""
_base_ = ['{ROOT}/configs/quickstart/loca_vit_demo.py']
model = dict(
    backbone=dict(
        arch=dict(embed_dims=32, depth=1, num_heads=2), img_size=32, pos_embed_std=1.0
    ),
    heads=dict(
        position=dict(grid=4, num_heads=2),
        cluster=dict(out_dims=16, projector=dict(hidden_dims=16, bottleneck_dims=8)),
    ),
    drop=dict(random=dict(keep=10)),
    no_positions=[],
)
_views = [
    dict(role='reference', size=32, scale=(0.5, 1.0), flip=0.0, grayscale=1.0),
    dict(role='random', size=32, scale=(0.3, 1.0), flip=0.5, grayscale=1.0),
    dict(role='focal', size=16, scale=(0.1, 0.3), count=2),
]
train_dataloader = dict(dataset=dict(pipeline=[dict(type='MultiCrop', views=_views)]))
"""


def save(home, name, extra='', plant=None):
    """A config and the checkpoint of a model with random weights."""
    folder = home / name
    folder.mkdir()
    config = folder / f'{name}.py'
    config.write_text(TINY + extra)
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for parameter in model.parameters():  # so that teacher and student differ
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    if plant:
        plant(model)
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(steps_per_epoch=1),
        train_dataloader=SimpleNamespace(
            batch_sampler=SimpleNamespace(global_batch_size=1)
        ),
        seed=0,
        cfg=cfg,
        model=model,
        optim_wrapper=torch.optim.SGD(model.parameters(), 0.1),
    )
    step = save_run(runner, 3, folder)
    return SimpleNamespace(config=str(config), step=str(step), model=model.eval())


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('position')


@pytest.fixture(scope='module')
def run(home):
    return save(home, 'tiny')


@pytest.fixture(scope='module')
def scenes(home):
    return [str(p) for p in DemoScenes(size=64).write_folder(home, range(2))]


@pytest.fixture
def rows(monkeypatch):
    """Arguments of each row's drawing, and the titles."""
    seen = SimpleNamespace(drawn=[], titles=[])

    def spy(*args, **options):
        seen.drawn.append(args)
        return draw_positions(*args, **options)

    def stack(pictures):
        seen.titles += pictures
        return stacked(pictures)

    stacked = position.stack_titled
    monkeypatch.setattr(position, 'draw_positions', spy)
    monkeypatch.setattr(position, 'stack_titled', stack)
    return seen


def command(run, out, images, *options):
    arguments = ['position', run.config, run.step, *images, '--out', str(out)]
    return main([*arguments, *map(str, options)])


def pictures(run, out, images, *options):
    """The PNGs of the command, in order, RGB."""
    assert command(run, out, images, *options) == 0
    return [cv2.imread(str(path))[:, :, ::-1] for path in sorted(out.glob('*.png'))]


WIDTH = 2 * 256 + BETWEEN_PX + 2 * GAP_PX  # views of 32 px, 8 times enlarged
ROW = TITLE_PX + 256 + 2 * GAP_PX


def test_a_picture_for_each_image_with_a_row_for_each_ratio(
    run, scenes, tmp_path, capsys
):
    sheets = pictures(run, tmp_path, scenes)
    names = [f'{i:03d}_{i:06d}.png' for i in range(2)]
    assert capsys.readouterr().out.split() == [str(tmp_path / n) for n in names]
    for sheet in sheets:
        assert sheet.shape == (3 * ROW, WIDTH, 3)
        # all rows show the same query
        queries = [sheet[i * ROW + TITLE_PX : (i + 1) * ROW, -260:] for i in range(3)]
        for other in queries[1:]:
            np.testing.assert_array_equal(queries[0], other)
    (short,) = pictures(run, tmp_path / 'one', scenes[:1], '--ratios', 0.25)
    assert short.shape == (ROW, WIDTH, 3)


def test_views_and_what_is_hidden_follow_the_seed(run, scenes, tmp_path):
    plain = pictures(run, tmp_path / 'a', scenes)
    again = pictures(run, tmp_path / 'b', scenes, '--seed', 0)
    other = pictures(run, tmp_path / 'c', scenes, '--seed', 1)
    for a, b, c in zip(plain, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def tokens(run, backbone, one, **options):
    pixels = torch.tensor(one.pixels).permute(2, 0, 1)[None, None]
    data = run.model.data_preprocessor(dict(inputs=dict(x=pixels)))
    with torch.no_grad():
        return backbone.eval()(data['inputs']['x'][0], **options).patches


@pytest.mark.parametrize('ratio', [0.0, 0.3, 0.8, 1.0])
def test_what_is_drawn_is_what_the_head_says(run, scenes, tmp_path, rows, ratio):
    pictures(run, tmp_path, scenes[:1], '--ratios', ratio)
    ((reference, query, grids, found, valid, visible),) = rows.drawn
    assert grids == ((4, 4), (4, 4))
    assert visible.sum() == math.floor((1 - ratio) * 16 + 1e-6)
    (places,) = np.nonzero(visible)
    assert (np.diff(places) == 1).all()  # a run, as in the config
    head, model = run.model.heads['position'], run.model
    # student's tokens of the whole query, the teacher's of what is seen
    ours = tokens(run, model.backbone, query)
    theirs = tokens(run, model.teacher.backbone, reference)[:, places]
    with torch.no_grad():
        logits = head.predictor(head.norm(head.block(ours, theirs)))[0]
    np.testing.assert_array_equal(found, logits.argmax(-1))
    target = query.geometry.greatest_overlap_patch(
        reference.geometry, (4, 4), (4, 4)
    ).numpy()
    np.testing.assert_array_equal(valid, target >= 0)
    assert valid.sum() > 0
    right = np.mean(found[valid] == target[valid])
    away = np.hypot(found // 4 - target // 4, found % 4 - target % 4)[valid].mean()
    assert rows.titles == [
        f'masking ratio {ratio:g}: {100 * right:.0f} % of {valid.sum()} patches in '
        f'place, {away:.2f} tokens off'
    ]


def test_a_head_that_is_trained_without_a_reference(home, scenes, tmp_path, rows):
    """Tokens tell their place alone, and the head sends each to another one."""
    sent = np.random.default_rng(0).permutation(16)

    def plant(model):
        for name, parameter in model.backbone.named_parameters():
            if 'patch_embed' in name or 'proj' in name or 'fc2' in name:
                parameter.data.zero_()
        with torch.no_grad():
            token = model.backbone.eval()(torch.zeros(1, 3, 32, 32)).patches[0]
            head = model.heads['position']
            head.predictor.bias.zero_()
            head.predictor.weight[sent] = head.norm(token)

    blind = 'model["heads"]["position"]["mask_ratio"] = 1.0'
    run = save(home, 'blind', blind, plant)
    assert run.model.heads['position'].block is None
    (sheet,) = pictures(run, tmp_path, scenes[:1], '--ratios', 1)
    ((_, _, _, found, valid, visible),) = rows.drawn
    np.testing.assert_array_equal(found, sent)
    assert not visible.any() and valid.any()
    colours = place_colours((4, 4))
    for token in np.flatnonzero(valid):  # 64 px a patch, in a square of 48
        row, column = divmod(sent[token], 4)
        top, left = TITLE_PX + GAP_PX + 64 * row, GAP_PX + 64 * column
        square = sheet[top + 8 : top + 56, left + 8 : left + 56]
        share = (square == colours[token]).all(-1).mean()
        assert share > 0.6  # the rest is the outline


def test_one_encoder_that_gets_its_visible_patches_only(
    home, scenes, tmp_path, rows, monkeypatch
):
    extra = """
model['heads']['position'].update(mask_ratio=0.0, encoder='student')
model['drop']['reference'] = dict(type='PatchDrop', keep=0.5, kind='random')
model['no_positions'] = ['random', 'focal']
"""
    run = save(home, 'student', extra)
    seen = []
    predict = PositionHead.predict

    def spy(head, queries, references):
        seen.append((queries, references))
        return predict(head, queries, references)

    monkeypatch.setattr(PositionHead, 'predict', spy)
    pictures(run, tmp_path, scenes[:1], '--ratios', 0.7)
    ((reference, query, *_, visible),) = rows.drawn
    (places,) = np.nonzero(visible)
    assert len(places) == 4 and (np.diff(places) > 1).any()  # random ones
    ours = tokens(run, run.model.backbone, query, positions=False)
    keep = torch.from_numpy(places)[None]
    theirs = tokens(run, run.model.backbone, reference, keep=keep)
    ((queries, references),) = seen
    torch.testing.assert_close(queries, ours)
    torch.testing.assert_close(references, theirs[None])


def test_two_global_views_one_of_them_the_reference(home, scenes, tmp_path, rows):
    extra = """
_roles = dict(reference_role='global', query_roles=['global'])
model['heads']['position'].update(_roles)
model['heads']['cluster'].update(_roles)
model['drop'] = None
_views[:] = [dict(role='global', size=32, scale=(0.4, 1.0), count=2)]
"""
    pictures(save(home, 'global', extra), tmp_path, scenes[:1])
    (reference, query, *_), *_ = rows.drawn
    assert not torch.equal(reference.geometry.box, query.geometry.box)


MISTAKES = {
    'no image': (dict(images=['no.jpg']), ["'no.jpg'", 'no such file']),
    'no picture': (dict(images=['{config}']), ['tiny.py', 'no picture']),
    'no config': (dict(config='no.py'), ['config no.py', 'no such file']),
    'no checkpoint': (dict(step='no.pth'), ['no.pth', 'no such file', 'step_*.pth']),
    'another file': (dict(step='{config}'), ['not a checkpoint of a run']),
    'a backbone': (dict(step='{backbone}'), ['a backbone alone', 'step_*.pth']),
    'config without a head': (
        dict(config=f'{ROOT}/configs/quickstart/glsd_swin_demo.py'),
        ['glsd_swin_demo.py', 'no PositionHead', 'view, region', 'loca_vit_demo.py'],
    ),
    'checkpoint without a head': (
        dict(step='{clusters}'),
        ['step_00000003.pth', "no head 'position'", 'that trained one'],
    ),
    'another network': (
        dict(config=f'{ROOT}/configs/quickstart/loca_vit_demo.py'),
        ['step_00000003.pth is of another architecture'],
    ),
    'ratio': (dict(options=['--ratios', '0', '1.2']), ['--ratios 1.2', '0 to 1']),
    'negative ratio': (dict(options=['--ratios', '-0.1']), ['--ratios -0.1', '0 to 1']),
    'not a number': (dict(options=['--ratios', 'nan']), ['--ratios nan', '0 to 1']),
    'boxes': (dict(config='{boxes}'), ["'position'", "task='box'", 'patch and center']),
    'no query': (dict(config='{lonely}'), ['roles reference', 'random, focal']),
    'out': (dict(options=['--out', '{config}/x']), ['cannot write', '--out']),
}


@pytest.fixture(scope='module')
def files(home, run):
    """What the mistakes name."""
    clusters = save(home, 'clusters', 'model["heads"]["position"] = None')
    boxes = home / 'boxes.py'
    boxes.write_text(TINY + 'model["heads"]["position"]["task"] = "box"')
    lonely = home / 'lonely.py'
    lonely.write_text(TINY + '_views[1:] = []')
    backbone = home / 'tiny' / 'backbone.safetensors'
    names = dict(config=run.config, step=run.step, clusters=clusters.step)
    return names | dict(boxes=str(boxes), lonely=str(lonely), backbone=str(backbone))


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_end_in_one_line(files, scenes, tmp_path, capsys, name):
    changes, words = MISTAKES[name]
    config = changes.get('config', files['config']).format(**files)
    step = changes.get('step', files['step']).format(**files)
    images = [image.format(**files) for image in changes.get('images', scenes[:1])]
    options = [option.format(**files) for option in changes.get('options', [])]
    out = ['--out', str(tmp_path / 'out')]
    assert main(['position', config, step, *images, *out, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    for word in words:
        assert word in error
    assert not (tmp_path / 'out').exists()


def test_a_head_without_a_block_sees_no_reference(home, scenes, tmp_path, capsys):
    run = save(home, 'blind2', 'model["heads"]["position"]["mask_ratio"] = 1.0')
    assert command(run, tmp_path / 'out', scenes[:1], '--ratios', 0.5, 1) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    for word in ('--ratios 0.5', 'mask_ratio=1', 'no block', '--ratios 1'):
        assert word in error
    assert not (tmp_path / 'out').exists()
    # nothing of 16 patches is left at 0.95 either
    assert command(run, tmp_path / 'out', scenes[:1], '--ratios', 0.95) == 0
