"""Matches as lines: pixels of the drawing, and the command that makes it."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config

from densessl.datasets import DemoScenes
from densessl.engine.checkpoint import save_run
from densessl.geometry import ViewGeometry
from densessl.models.heads.region_head import RegionHead
from densessl.models.matchers import GeometricMatcher, ViewTokens, build_matcher
from densessl.registry import MODELS
from densessl.visualization.main import main
from densessl.visualization.matches import (
    BETWEEN_PX,
    GAP_PX,
    TITLE_PX,
    draw_matches,
    match_distance,
    place_colours,
    stack_titled,
    thinned,
)

GRID = (4, 6)
SIZE = (64, 96)  # tokens of 16 px
GREY = np.full((*SIZE, 3), 99, np.uint8)
RIGHT = GAP_PX + SIZE[1] + BETWEEN_PX  # first column of the right view
DOT = 5  # px from a token's centre to the end of its dot's soft rim


def geometry(box, flip=False):
    return ViewGeometry.from_lists(
        box=[[box]], flip=[[flip]], size=[[SIZE]], source=[[(200, 300)]]
    )


def by_place(ours, theirs):
    """Index and validity ``(24,)`` of GLSD's matches of two views."""
    tokens = torch.zeros(1, 1, 24, 1)
    views = (ViewTokens(tokens, GRID, each) for each in (ours, theirs))
    index, valid = GeometricMatcher()(*views)
    return index[0, 0].numpy(), valid[0, 0].numpy()


def only(token):
    return np.arange(24) == token


def ink(index, valid, **options):
    """Sheet, and where it differs from the sheet without matches."""
    sheet = draw_matches((GREY, GREY), (GRID, GRID), index, valid, **options)
    blank = draw_matches((GREY, GREY), (GRID, GRID), index, valid & False, **options)
    return sheet, (sheet != blank).any(-1)


def spans(mask):
    """First row, end row, first column, end column of a mask's True."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def centre(token, grid=GRID, size=SIZE):
    row, column = divmod(token, grid[1])
    cell = size[0] // grid[0], size[1] // grid[1]
    return row * cell[0] + cell[0] // 2, column * cell[1] + cell[1] // 2


# Drawing


def test_sheet_without_matches_is_the_views():
    rng = np.random.default_rng(0)
    left = rng.integers(0, 256, (64, 96, 3), np.uint8)
    right = rng.integers(0, 256, (32, 48, 3), np.uint8)
    none = np.zeros(24, bool)
    sheet = draw_matches((left, right), (GRID, (2, 3)), np.zeros(24, int), none)
    assert sheet.shape == (64 + 2 * GAP_PX, RIGHT + 48 + GAP_PX, 3)
    rest = sheet.copy()
    for view, x in ((left, GAP_PX), (right, RIGHT)):
        height, width = view.shape[:2]
        place = slice(GAP_PX, GAP_PX + height), slice(x, x + width)
        np.testing.assert_array_equal(sheet[place], view)
        rest[place] = 255
    assert (rest == 255).all()


def test_zoom_enlarges_whole_pixels():
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (2, 64, 96, 3), np.uint8)
    none = np.zeros(24, bool)
    sheet = draw_matches(tuple(views), (GRID, GRID), only(0), none, zoom=3)
    assert sheet.shape == (3 * 64 + 2 * GAP_PX, 6 * 96 + BETWEEN_PX + 2 * GAP_PX, 3)
    for view, x in zip(views, (GAP_PX, GAP_PX + 3 * 96 + BETWEEN_PX), strict=True):
        found = sheet[GAP_PX:-GAP_PX, x : x + 3 * 96].reshape(64, 3, 96, 3, 3)
        assert (found == view[:, None, :, None]).all()


@pytest.mark.parametrize('zoom', [1, 2])
def test_lines_end_in_the_centres_of_tokens(zoom):
    index = np.random.default_rng(0).permutation(24)
    for token in range(24):
        sheet, mask = ink(index, only(token), zoom=zoom)
        right = GAP_PX + zoom * SIZE[1] + BETWEEN_PX
        (y, x), (v, u) = centre(token), centre(index[token])
        y, x, v, u = GAP_PX + zoom * y, GAP_PX + zoom * x, GAP_PX + zoom * v, u * zoom
        u += right
        top, bottom, first, last = spans(mask)
        # dots around the corners where four pixels meet, as many px on each side
        assert (first, last) == (x - DOT, u + DOT)
        assert (top, bottom) == (min(y, v) - DOT, max(y, v) + DOT)
        colour = place_colours(GRID)[token]
        for row, column in ((y, x), (v, u)):
            dot = sheet[row - 2 : row + 2, column - 2 : column + 2]
            assert (dot == colour).all()
        # and between the views the line is where a ruler would draw it
        for column in range(right - BETWEEN_PX, right):
            rows = np.flatnonzero(mask[:, column])
            at = y + (v - y) * (column + 0.5 - x) / (u - x)
            assert len(rows) and np.abs(rows + 0.5 - at).max() < 2.5


def test_identical_views_give_level_lines_of_one_length():
    view = geometry((10, 20, 120, 80))
    index, valid = by_place(view, view)
    assert valid.all()
    for token in range(24):
        _, mask = ink(index, only(token))
        top, bottom, first, last = spans(mask)
        assert bottom - top == 2 * DOT
        assert last - first == SIZE[1] + BETWEEN_PX + 2 * DOT
        y, x = centre(token)
        assert (top, first) == (GAP_PX + y - DOT, GAP_PX + x - DOT)


def test_a_flipped_copy_gives_lines_to_the_mirrored_place():
    box = (10, 20, 120, 80)
    index, valid = by_place(geometry(box), geometry(box, flip=True))
    assert valid.all()
    for token in range(24):
        _, mask = ink(index, only(token))
        top, bottom, first, last = spans(mask)
        y, x = centre(token)
        assert (top, bottom) == (GAP_PX + y - DOT, GAP_PX + y + DOT)
        assert (first, last) == (GAP_PX + x - DOT, RIGHT + SIZE[1] - x + DOT)


def test_a_shifted_view_shows_only_what_both_hold():
    # two tokens of 20 px to the right: columns 2 to 5 are the other's 0 to 3
    index, valid = by_place(geometry((10, 20, 120, 80)), geometry((50, 20, 120, 80)))
    assert valid.reshape(GRID).all(0).tolist() == [False] * 2 + [True] * 4
    _, mask = ink(index, valid)
    left = mask[:, GAP_PX : GAP_PX + SIZE[1]]
    right = mask[:, RIGHT:-GAP_PX]
    assert not left[:, : 2 * 16].any()  # no line starts, or passes, there
    assert not right[:, 4 * 16 :].any()
    for row in range(4):
        y = GAP_PX + 16 * row + 8
        for columns, view in ((range(2, 6), left), (range(4), right)):
            for column in columns:
                assert view[y - 2 : y + 2, 16 * column + 6 : 16 * column + 10].all()


def test_colours_tell_the_place():
    colours = place_colours(GRID)
    assert colours.shape == (24, 3) and len(np.unique(colours, axis=0)) == 24
    hsv = (
        cv2.cvtColor(colours[None], cv2.COLOR_RGB2HSV)[0].reshape(*GRID, 3).astype(int)
    )
    assert (np.diff(hsv[..., 0], axis=1) > 10).all()  # columns: hue
    assert (np.ptp(hsv[..., 0], axis=0) <= 1).all()
    assert (np.diff(hsv[..., 2], axis=0) < -10).all()  # rows: brightness
    assert (np.ptp(hsv[..., 2], axis=1) == 0).all()
    np.testing.assert_array_equal(colours[0], (255, 0, 0))


def test_thinning_is_even_and_the_same_for_all_matchers():
    grid = (8, 8)
    every = np.ones(64, bool)
    np.testing.assert_array_equal(thinned(every, grid, 64), np.arange(64))
    np.testing.assert_array_equal(thinned(every, grid, 99), np.arange(64))
    kept = np.isin(np.arange(64), thinned(every, grid, 16)).reshape(grid)
    assert kept.sum() == 16
    assert kept.any(0).all() and kept.any(1).all()  # each row and each column
    quarters = kept.reshape(2, 4, 2, 4).sum((1, 3))
    assert quarters.min() >= 3 and quarters.max() <= 5
    some = every.copy()
    some[::3] = False
    few = thinned(some, grid, 16)
    assert len(few) == 16 and some[few].all()
    assert set(np.flatnonzero(kept.ravel() & some)) <= set(few)


def test_as_many_lines_as_asked_for():
    view = geometry((10, 20, 120, 80))
    index, valid = by_place(view, view)
    for lines in (1, 5, 24, 99):
        sheet, _ = ink(index, valid, lines=lines)
        starts = [
            (sheet[GAP_PX + y, GAP_PX + x] == place_colours(GRID)[token]).all()
            for token in range(24)
            for y, x in [centre(token)]
        ]
        assert sum(starts) == min(lines, 24)


def test_titles_stand_above_their_pictures():
    pictures = {'one': GREY, 'two' * 40: GREY // 2}
    sheet = stack_titled(pictures)
    assert sheet.shape == (2 * (TITLE_PX + 64), 96, 3)
    for i, picture in enumerate(pictures.values()):
        top = i * (TITLE_PX + 64)
        title = sheet[top : top + TITLE_PX]
        np.testing.assert_array_equal(sheet[top + TITLE_PX :][:64], picture)
        assert (title < 128).any() and (title[:, -GAP_PX:] == 255).all()


# Distance


def test_distance_is_counted_in_teacher_tokens_within_the_overlap():
    ours, theirs = geometry((10, 20, 120, 80)), geometry((50, 20, 120, 80), flip=True)
    grids = (GRID, GRID)
    index, _ = by_place(ours, theirs)
    index = torch.from_numpy(index)
    away, count = match_distance(ours[0, 0], theirs[0, 0], grids, index)
    assert count == 16 and away == pytest.approx(0, abs=1e-9)
    wrong = torch.full((24,), 0)  # the right upper corner of the unflipped view
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing='ij')
    expected = torch.hypot(rows, 5 - columns).mean().item()
    away, count = match_distance(ours[0, 0], theirs[0, 0], grids, wrong)
    assert count == 16 and away == pytest.approx(expected)
    apart = geometry((200, 100, 60, 40))
    away, count = match_distance(ours[0, 0], apart[0, 0], grids, wrong)
    assert count == 0 and np.isnan(away)


def test_distance_is_the_monitor_of_training():
    torch.manual_seed(0)
    both = ViewGeometry.from_lists(
        box=[[(10, 20, 120, 80), (33, 7, 90, 110)]],
        flip=[[False, True]],
        size=[[SIZE, SIZE]],
        source=[[(200, 300)] * 2],
    )
    tokens = torch.randn(1, 2, 24, 8)
    views = ViewTokens(tokens, GRID, both)
    head = RegionHead(8, 16, matching='similarity')
    _, _, monitors = head.match([views], views)
    total = inside = 0
    for i in (0, 1):
        one, other = (
            ViewTokens(tokens[:, k : k + 1], GRID, both[:, k : k + 1])
            for k in (i, 1 - i)
        )
        index = build_matcher('similarity')(one, other).index[0, 0]
        away, count = match_distance(both[0, i], both[0, 1 - i], (GRID, GRID), index)
        total, inside = total + away * count, inside + count
    assert monitors['match_distance'].item() == pytest.approx(total / inside)


# The command


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A tiny config, a run's checkpoint with its backbone, and three demo scenes."""
    home = tmp_path_factory.mktemp('run')
    config = home / 'tiny.py'
    config.write_text(
        f"""
_base_ = ['{ROOT}/configs/quickstart/glsd_swin_demo.py']
_head = dict(out_dims=16, projector=dict(hidden_dims=16, bottleneck_dims=8))
model = dict(
    backbone=dict(
        arch=dict(embed_dims=8, depths=[1, 1], num_heads=[1, 2]),
        img_size=32, window_size=[4, 4],
    ),
    heads=dict(view=_head, region=_head),
)
_views = [
    dict(role='global', count=2, size=32, scale=(0.4, 1.0), grayscale=1.0),
    dict(role='local', count=1, size=16, scale=(0.05, 0.4)),
]
train_dataloader = dict(dataset=dict(pipeline=[dict(type='MultiCrop', views=_views)]))
"""
    )
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for parameter in model.teacher.parameters():  # no longer the student's
        parameter.data.add_(0.05 * torch.randn_like(parameter))
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
    step = save_run(runner, 3, home)
    scenes = [str(p) for p in DemoScenes(size=64).write_folder(home, range(3))]
    return SimpleNamespace(
        config=str(config),
        step=str(step),
        backbone=str(home / 'backbone.safetensors'),
        scenes=scenes,
        model=model,
        home=home,
    )


def draw(run, out, *options, checkpoint=None, images=None) -> list[np.ndarray]:
    """The PNGs that the command writes, in order, RGB."""
    command = ['matches', run.config, checkpoint or run.step]
    command += [*(images or run.scenes), '--out', str(out), *map(str, options)]
    assert main(command) == 0
    return [cv2.imread(str(path))[:, :, ::-1] for path in sorted(out.glob('*.png'))]


WIDTH = 2 * 256 + BETWEEN_PX + 2 * GAP_PX  # views of 32 px, 8 times enlarged
ROW = TITLE_PX + 256 + 2 * GAP_PX


def test_a_picture_for_each_image_with_a_row_for_each_matcher(run, tmp_path, capsys):
    sheets = draw(run, tmp_path)
    names = [f'{i:03d}_{i:06d}.png' for i in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert capsys.readouterr().out.split() == [str(tmp_path / n) for n in names]
    for sheet in sheets:
        assert sheet.shape == (2 * ROW, WIDTH, 3)
        above, below = sheet[:ROW], sheet[ROW:]
        assert not np.array_equal(above[:TITLE_PX], below[:TITLE_PX])
        assert not np.array_equal(above[TITLE_PX:], below[TITLE_PX:])  # the lines
        share = (above[TITLE_PX:] == below[TITLE_PX:]).all(-1).mean()
        assert share > 0.5  # on the same two views
        saturated = above[TITLE_PX:].max(-1).astype(int) - above[TITLE_PX:].min(-1)
        assert (saturated == 255).any()  # red of the first column


def test_student_to_the_left_and_teacher_to_the_right(run, tmp_path, monkeypatch):
    seen = []

    def spy(views, grids, index, valid, **options):
        seen.append((views, grids, index, valid))
        return draw_matches(views, grids, index, valid, **options)

    monkeypatch.setattr('densessl.visualization.main.draw_matches', spy)
    draw(run, tmp_path / 'run', images=run.scenes[:1])
    draw(run, tmp_path / 'file', checkpoint=run.backbone, images=run.scenes[:1])
    preprocess = run.model.data_preprocessor
    for first, student in ((0, run.model.backbone), (2, run.model.teacher.backbone)):
        (left, right), grids, index, valid = seen[first]
        assert grids == ((4, 4), (4, 4)) and valid.all()
        with torch.no_grad():
            ours, theirs = (
                backbone.eval()(
                    preprocess(
                        dict(
                            inputs=dict(
                                x=torch.tensor(view).permute(2, 0, 1)[None, None]
                            )
                        )
                    )['inputs']['x'][0]
                ).patches[0]
                for backbone, view in (
                    (student, left),
                    (run.model.teacher.backbone, right),
                )
            )
        for token in range(16):
            cosines = [
                float(ours[token] @ each / ours[token].norm() / each.norm())
                for each in theirs
            ]
            assert cosines[index[token]] == pytest.approx(max(cosines), abs=1e-5)
    np.testing.assert_array_equal(seen[1][2], seen[3][2])  # place needs no features


def test_views_follow_seed_and_size_and_keep_their_colours(run, tmp_path):
    plain = draw(run, tmp_path / 'a')
    again = draw(run, tmp_path / 'b', '--seed', 0)
    other = draw(run, tmp_path / 'c', '--seed', 1)
    for a, b, c in zip(plain, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    # the config's views are grey: these are not
    inside = plain[0][TITLE_PX + GAP_PX :][:256, GAP_PX : GAP_PX + 256].astype(int)
    assert (np.ptp(inside, axis=-1) > 20).mean() > 0.3
    large = draw(run, tmp_path / 'd', '--size', 48, images=run.scenes[:1])
    assert large[0].shape == (2 * (TITLE_PX + 6 * 48 + 8), 12 * 48 + BETWEEN_PX + 8, 3)


def test_between_matches_each_two_pictures_by_similarity(run, tmp_path):
    (sheet,) = draw(run, tmp_path / 'a', '--between', images=run.scenes[:2])
    assert sheet.shape == (ROW, WIDTH, 3)
    four = [*run.scenes[:2], *run.scenes[:2]]
    draw(run, tmp_path / 'b', '--between', images=four)
    names = ['000_000000_000001.png', '001_000000_000001.png']
    assert sorted(path.name for path in (tmp_path / 'b').iterdir()) == names
    # the left view is the first picture's, the right one the second's
    alone = draw(run, tmp_path / 'c', '--lines', 1, images=run.scenes[:2])
    (sheet,) = draw(
        run, tmp_path / 'd', '--lines', 1, '--between', images=run.scenes[:2]
    )
    half = GAP_PX + 256
    for part, expected in (
        (np.s_[TITLE_PX:ROW, :half], alone[0]),
        (np.s_[TITLE_PX:ROW, -half:], alone[1]),
    ):
        assert (sheet[part] == expected[part]).all(-1).mean() > 0.9


def test_a_config_with_one_view_a_role_gives_two(run, tmp_path):
    config = tmp_path / 'one.py'
    views = [
        dict(role='a', size=32, scale=(0.4, 1.0)),
        dict(role='b', size=16, scale=(0.1, 0.4)),
    ]
    config.write_text(
        f"_base_ = ['{run.config}']\ntrain_dataloader = dict(dataset=dict("
        f"pipeline=[dict(type='MultiCrop', views={views})]))"
    )
    out = tmp_path / 'out'
    command = ['matches', str(config), run.step, run.scenes[0], '--out', str(out)]
    assert main(command) == 0
    assert cv2.imread(str(out / '000_000000.png')).shape == (2 * ROW, WIDTH, 3)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(images=['no.jpg']), ["'no.jpg'", 'no such file']),
        (dict(images=['{config}']), ['tiny.py', 'no picture']),
        (dict(config='no.py'), ['config no.py', 'no such file']),
        (
            dict(checkpoint='no.pth'),
            ['checkpoint no.pth', 'no such file', 'step_*.pth'],
        ),
        (dict(checkpoint='no.safetensors'), ['no.safetensors', 'no such file']),
        (dict(checkpoint='{config}'), ['tiny.py', 'not a checkpoint of a run']),
        (
            dict(config=f'{ROOT}/configs/quickstart/glsd_swin_demo.py'),
            ['step_00000003.pth is of another architecture', 'missing'],
        ),
        (
            dict(
                config=f'{ROOT}/configs/quickstart/glsd_swin_demo.py',
                checkpoint='{backbone}',
            ),
            ['backbone.safetensors is of another architecture', 'misshapen'],
        ),
        (dict(options=['--size', '36']), ['36x36 px', '8 px', 'multiple of 8']),
        (dict(options=['--size', '0']), ['--size 0', '1 or more']),
        (dict(options=['--lines', '0']), ['--lines 0', '1 or more']),
        (dict(options=['--between']), ['--between', '1 picture', 'even number']),
        (dict(options=['--out', '{config}/x']), ['cannot write', '--out']),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, capsys, changes, words):
    def fill(value):
        return value.format(config=run.config, backbone=run.backbone)

    command = ['matches', fill(changes.get('config', run.config))]
    command += [fill(changes.get('checkpoint', run.step))]
    command += [fill(image) for image in changes.get('images', run.scenes[:1])]
    command += ['--out', str(tmp_path / 'out')]
    command += [fill(option) for option in changes.get('options', [])]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    for word in words:
        assert word in error
    assert not (tmp_path / 'out').exists()
