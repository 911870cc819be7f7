"""Reference points in two views, their attention, and the command that draws both."""

import copy
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from timm.models.vision_transformer import Block

from densessl.interop.backbone import save_backbone
from densessl.registry import MODELS
from densessl.visualization.main import main
from densessl.visualization.matches import GAP_PX, TITLE_PX, place_colours
from densessl.visualization.points import (
    draw_attention,
    draw_pair,
    reference_attention,
)
from densessl.visualization.views import VIEW_PX

SIDE, ZOOM = 32, VIEW_PX // 32  # px of a view, and of one of its pixels
CELL = VIEW_PX + 2 * GAP_PX
MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
CONFIG = f"""
_base_ = ['{ROOT}/configs/quickstart/densedino_vit_demo.py']
model = dict(
    backbone=dict(arch=dict(embed_dims=32, depth=2, num_heads=2), img_size=32),
    heads=dict(points=dict(points=3)),
)
_view = dict(role='global', count=2, size=32, scale=(0.3, 0.6), grayscale=1.0)
train_dataloader = dict(
    dataset=dict(pipeline=[dict(type='MultiCrop', views=[_view])])
)
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A tiny config, a random backbone, and a picture that tells where it is seen.

    Red is a pixel's column, green its row, blue is the same everywhere.
    """
    home = tmp_path_factory.mktemp('run')
    config = home / 'tiny.py'
    config.write_text(CONFIG)
    built = Config.fromfile(config).model.backbone
    torch.manual_seed(0)
    backbone = MODELS.build(built).eval()
    for parameter in backbone.parameters():  # attention far from uniform
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    path = home / 'backbone.safetensors'
    save_backbone(path, backbone, built.to_dict(), mean=MEAN, std=STD)
    rows, columns = np.mgrid[:200, :240].astype(np.uint8)
    oracle = np.stack([columns, rows, np.full_like(rows, 128)], -1)
    cv2.imwrite(str(home / 'oracle.png'), oracle[:, :, ::-1])
    return SimpleNamespace(
        config=str(config),
        checkpoint=str(path),
        picture=str(home / 'oracle.png'),
        backbone=backbone,
        home=home,
    )


def draw(run, out, *options, config=None) -> np.ndarray:
    """The PNG of the oracle picture, RGB."""
    command = ['points', config or run.config, run.checkpoint, run.picture]
    assert main([*command, '--out', str(out), *map(str, options)]) == 0
    (path,) = out.iterdir()
    return cv2.imread(str(path))[:, :, ::-1]


def cells(sheet, side=VIEW_PX, top=0):
    """Rows of the four pictures of a block with titles from row ``top`` on."""
    step = side + 2 * GAP_PX
    rows = (len(sheet) - top - TITLE_PX) // step
    starts = [top + TITLE_PX + GAP_PX + step * i for i in range(rows)]
    return [
        [
            sheet[y : y + side, x : x + side]
            for x in range(GAP_PX, sheet.shape[1], side + 2 * GAP_PX)
        ]
        for y in starts
    ]


def dot(cell, colour):
    """Centre of the pixels of a colour ``(x, y)``, and how many there are."""
    y, x = np.nonzero((cell == colour).all(-1))
    return np.array([x.mean() + 0.5, y.mean() + 0.5]), len(x)


def source_of(cell, at):
    """What place of the oracle picture a place of a view shows, read off its pixels."""
    bare = (cell[..., 2] == 128).astype(np.uint8)  # no dots, nor their rims
    y, x = np.nonzero(cv2.erode(bare, np.ones((5, 5), np.uint8)))
    table = np.stack([x + 0.5, y + 0.5, np.ones(len(x))], -1)
    values = cell[y, x, :2].astype(float) + 0.5  # pixel i covers [i, i + 1)
    fit, *_ = np.linalg.lstsq(table, values, rcond=None)
    assert np.abs(table @ fit - values).max() < 3  # views are linear maps
    return np.array([*at, 1.0]) @ fit


def whole(cell, colour):
    """Whether a dot does not touch the border of its view."""
    y, x = np.nonzero((cell == colour).all(-1))
    return min(x.min(), y.min()) > 0 and max(x.max(), y.max()) < len(cell) - 1


@pytest.mark.parametrize(('seed', 'count'), [(0, 5), (1, 4), (2, 4), (3, 4)])
def test_a_point_shows_one_place_of_the_picture_in_both_views(
    run, tmp_path, seed, count
):
    sheet = draw(run, tmp_path, '--seed', seed, '--points', count)
    assert sheet.shape == (TITLE_PX + count * CELL, 4 * CELL, 3)
    colours, found = place_colours((1, count)), []
    for row, (left, right, *_) in enumerate(cells(sheet)):
        for i, colour in enumerate(colours):
            if not (whole(left, colour) and whole(right, colour)):
                continue
            (a, size), (b, other) = dot(left, colour), dot(right, colour)
            if i == row:
                found.append(i)
                assert min(size, other) > 60  # the row's own point is large
            if size > 15 and other > 15:  # not hidden by another point
                gap = source_of(left, a) - source_of(right, b)
                assert np.abs(gap).max() < 2  # a view's pixel shows about 4 x 4
    assert len(found) >= count - 1


def test_views_of_these_seeds_differ_and_one_of_a_pair_is_flipped(run, tmp_path):
    mixed = 0
    for seed in range(4):
        sheet = draw(run, tmp_path / str(seed), '--points', 1, '--seed', seed)
        ((left, right, *_),) = cells(sheet)
        assert not np.array_equal(left, right)
        rises = [
            source_of(cell, (VIEW_PX, 0))[0] > source_of(cell, (0, 0))[0]
            for cell in (left, right)
        ]
        mixed += rises[0] != rises[1]
    assert mixed  # else the test above proves too little


def expected_attention(backbone, pixels, places):
    """Softmax over patches and the token itself, all tokens in one masked table."""
    image = torch.tensor(pixels.copy()).permute(2, 0, 1).double()
    image = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        x, (h, w) = backbone.embed(image[None])
        references = backbone.position_embeddings_at(places[None], (h, w))
        n, m = x.shape[1], references.shape[1]
        mask = torch.full((n + m, n + m), -torch.inf).double()
        first = n - h * w
        mask[:n, :n] = 0
        mask[n:, first:n] = 0
        mask[n:, n:].fill_diagonal_(0)
        x = torch.cat([x, references], 1)
        for block in backbone.blocks[:-1]:
            x = Block.forward(block, x, attn_mask=mask)  # timm's
        block = backbone.blocks[-1]
        heads = block.attn.num_heads
        q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        total = 0
        for i in range(heads):
            part = slice(i * q.shape[-1] // heads, (i + 1) * q.shape[-1] // heads)
            logits = q[..., part] @ k[..., part].mT / (part.stop - part.start) ** 0.5
            total = total + (logits + mask).softmax(-1)[0, n:, first:n]
    return (total / heads).unflatten(1, (h, w)).numpy()


@pytest.fixture
def extractor(run):
    return SimpleNamespace(
        backbone=run.backbone,
        device=torch.device('cpu'),
        mean=torch.tensor(MEAN).view(3, 1, 1),
        std=torch.tensor(STD).view(3, 1, 1),
    )


@pytest.mark.parametrize('size', [(32, 32), (24, 40)])
def test_attention_is_a_masked_softmax(run, extractor, size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    places = torch.tensor([[0.1, 0.2], [0.9, 0.4], [0.5, 0.5]]).double()
    found = reference_attention(extractor, pixels, places)
    assert found.shape == (3, size[0] // 8, size[1] // 8)
    exact = expected_attention(copy.deepcopy(run.backbone).double(), pixels, places)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-6)
    assert np.ptp(found, axis=0).max() > 0.01  # points look at different places


def test_maps_of_the_sheet_are_those_of_its_points_and_views(
    run, tmp_path, monkeypatch
):
    seen = []

    def spy(*arguments):
        seen.append(arguments)
        return draw_pair(*arguments)

    monkeypatch.setattr('densessl.visualization.points.draw_pair', spy)
    sheet = draw(run, tmp_path)
    ((pair, _, places, weights),) = seen
    colours = place_colours((1, 3))
    for k, view in enumerate(pair):
        expected = expected_attention(
            copy.deepcopy(run.backbone).double(), view.pixels, torch.tensor(places[k])
        )
        np.testing.assert_allclose(weights[k], expected, rtol=1e-3, atol=1e-6)
        pixels = view.pixels.repeat(ZOOM, 0).repeat(ZOOM, 1)
        for i, row in enumerate(cells(sheet)):
            differs = (row[2 + k] != draw_attention(pixels, weights[k][i])).any(-1)
            y, x = np.nonzero(differs)
            away = np.hypot(*(np.stack([x, y], -1) + 0.5 - VIEW_PX * places[k, i]).T)
            assert 0 < len(away) < 120 and away.max() < 6  # the point's own dot
            assert (row[2 + k] == colours[i]).all(-1).any()


def test_colours_of_a_map_follow_its_weights():
    share = np.array([[0.0, 0.1], [0.3, 0.2]])
    cell = draw_attention(np.full((16, 24, 3), 80, np.uint8), share)
    assert cell.shape == (16, 24, 3)
    parts = cell.reshape(2, 8, 2, 12, 3)
    assert (parts == parts[:, :1, :, :1]).all()
    light = parts[:, 0, :, 0].astype(int).sum(-1)
    assert light[0, 0] < light[0, 1] < light[1, 1] < light[1, 0]
    # only shares of the largest weight count
    np.testing.assert_array_equal(
        cell, draw_attention(np.full((16, 24, 3), 80, np.uint8), share / 7)
    )


def test_points_on_a_grid_lie_in_the_cells_of_the_overlap(run, tmp_path):
    sheet = draw(run, tmp_path, '--points', 4, '--sampling', 'grid')
    ((left, *_), *_) = cells(sheet)
    (a, _), (b, _), (c, _), (d, _) = (dot(left, x) for x in place_colours((1, 4)))
    for near, far in ((a, b), (c, d)):
        assert near[1] == pytest.approx(far[1], abs=0.5)  # rows are level
    for above, below in ((a, c), (b, d)):
        assert above[0] == pytest.approx(below[0], abs=0.5)


def test_points_and_views_follow_the_seed_and_the_config(run, tmp_path):
    sheets = [draw(run, tmp_path / str(i), '--seed', i) for i in (0, 1)]
    np.testing.assert_array_equal(sheets[0], draw(run, tmp_path / 'again'))
    assert not np.array_equal(*sheets)
    assert len(cells(sheets[0])) == 3  # the config's number


def other(run, tmp_path, text):
    path = tmp_path / 'other.py'
    path.write_text(f"_base_ = ['{run.config}']\n{text}")
    return str(path)


def test_each_view_of_any_size_meets_the_first(run, tmp_path):
    views = [
        dict(role='global', count=2, size=32, scale=(0.4, 1.0)),
        dict(role='local', count=1, size=16, scale=(0.2, 0.4)),
    ]
    config = other(
        run,
        tmp_path,
        'train_dataloader = dict(dataset=dict(pipeline='
        f"[dict(type='MultiCrop', views={views}, min_overlap=(0.02, 0.01))]))",
    )
    sheet = draw(run, tmp_path / 'out', config=config)
    assert sheet.shape == (2 * (TITLE_PX + 3 * CELL), 4 * CELL, 3)
    below = sheet[TITLE_PX + 3 * CELL :]
    local = below[TITLE_PX + GAP_PX :, CELL + GAP_PX :][:128, :128]
    assert len({tuple(c) for c in local[::8, ::8].reshape(-1, 3)}) > 50
    margin = below[TITLE_PX + GAP_PX + 128 :, CELL : CELL + 128 + 2 * GAP_PX]
    assert (margin[: 128 - GAP_PX] == 255).all()


def test_views_apart_are_drawn_without_points(run, tmp_path):
    view = dict(role='global', count=2, size=32, scale=(0.02, 0.03))
    config = other(
        run,
        tmp_path,
        'train_dataloader = dict(dataset=dict(pipeline='
        f"[dict(type='MultiCrop', views=[{view}])]))",
    )
    sheet = draw(run, tmp_path / 'out', '--seed', 1, config=config)
    assert sheet.shape == (TITLE_PX + CELL, 2 * CELL, 3)
    ((left, right),) = cells(sheet)
    assert (left[..., 2] == 128).all() and (right[..., 2] == 128).all()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (
            dict(config=f'{ROOT}/configs/quickstart/dino_vit-t8_demo.py'),
            ['dino_vit-t8_demo.py', 'no points among the heads (view)', 'PointHead'],
        ),
        (
            dict(text="model = dict(backbone=dict(type='SwinTransformer'))"),
            ['other.py', 'need a ViT', 'SwinTransformer'],
        ),
        (
            dict(text='model = dict(heads=dict(points=dict(content=True)))'),
            ['heads.points.content=True', 'content=False'],
        ),
        (
            dict(
                text='train_dataloader = dict(dataset=dict(pipeline='
                "[dict(type='MultiCrop', "
                "views=[dict(role='global', size=32, scale=(0.4, 1.0))])]))"
            ),
            ['other.py', 'cuts one', 'add a view'],
        ),
        (dict(config='no.py'), ['config no.py', 'no such file']),
        (dict(checkpoint='no.pth'), ['checkpoint no.pth', 'no such file']),
        (dict(picture='no.jpg'), ["'no.jpg'", 'no such file']),
        (
            dict(text='model = dict(backbone=dict(arch=dict(depth=3)))'),
            ['backbone.safetensors is of another architecture', 'missing'],
        ),
        (dict(options=['--points', '0']), ['points=0', 'give 1']),
        (
            dict(options=['--points', '5', '--sampling', 'grid']),
            ['points=5', 'square grid'],
        ),
        (dict(options=['--out', '{config}/x']), ['cannot write', '--out']),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, capsys, changes, words):
    config = changes.get('config', run.config)
    if 'text' in changes:
        config = other(run, tmp_path, changes['text'])
    command = ['points', config, changes.get('checkpoint', run.checkpoint)]
    command += [changes.get('picture', run.picture), '--out', str(tmp_path / 'out')]
    command += [option.format(config=config) for option in changes.get('options', [])]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    for word in words:
        assert word in error
    assert not (tmp_path / 'out').exists()
