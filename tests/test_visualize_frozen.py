"""Attention, PCA and similarity of a frozen backbone, and their commands."""

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from conftest import build_model, model_config, optim_wrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from safetensors.torch import save_file

from densessl.datasets import DemoScenes
from densessl.engine.checkpoint import save_run
from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor
from densessl.models.backbones.window_attention import ShiftWindowMSA
from densessl.registry import MODELS
from densessl.visualization.attention import (
    QueryAttention,
    attention_sheet,
    entropies,
    mass_mask,
    query_attention,
)
from densessl.visualization.main import main
from densessl.visualization.matches import GAP_PX, TITLE_PX
from densessl.visualization.panels import (
    enlarged,
    framed,
    heat_over,
    patch_at,
    side_by_side,
)
from densessl.visualization.similarity import cosines, similarity_sheets

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
VIT = model_config()['backbone']
TIMM_VIT = dict(
    type='TimmBackbone',
    name='vit_tiny_patch16_224',
    img_size=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
)
SWIN = dict(
    type='SwinTransformer',
    arch=dict(embed_dims=8, depths=[1, 2], num_heads=[1, 2]),
    img_size=64,
    window_size=[4, 4],
)
TIMM_SWIN = dict(
    type='TimmBackbone',
    name='swin_tiny_patch4_window7_224',
    img_size=64,
    embed_dim=8,
    depths=(1, 2),
    num_heads=(1, 2),
    window_size=4,
)


def extractor_of(config) -> FeatureExtractor:
    torch.manual_seed(0)
    backbone = MODELS.build(config)
    for parameter in backbone.parameters():  # sharp attention, biases that matter
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return FeatureExtractor(backbone, MEAN, STD)


def centre_of(patch, grid):
    row, column = divmod(patch, grid[1])
    return (column + 0.5) / grid[1], (row + 0.5) / grid[0]


def all_rows(extractor, image=IMAGE, grid=(5, 7)):
    """Attention of every patch, ``(heads, N, N)``."""
    rows = []
    for patch in range(grid[0] * grid[1]):
        found = query_attention(extractor, image, centre_of(patch, grid))
        assert found.query == patch and found.grid == grid
        rows.append(found.weights)
    return torch.stack(rows, 1)


# Weights


@pytest.mark.parametrize('cls_token', [False, True])
def test_weights_of_a_vit_give_the_output_of_the_fused_attention(cls_token):
    extractor = extractor_of(VIT | dict(cls_token=cls_token))
    block, seen = extractor.backbone.blocks[-1], {}
    attn = block.attn
    block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    attn.proj.register_forward_hook(lambda _, args, out: seen.update(out=out))
    weights = all_rows(extractor)
    if cls_token:  # what the patches do not get, the class token gets
        first = query_attention(extractor, IMAGE)
        assert first.query is None
        weights = torch.cat([first.weights[:, None], weights], 1)
        weights = torch.cat([1 - weights.sum(-1, keepdim=True), weights], -1)
    assert attn.fused_attn
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    values = attn.qkv(block.norm1(seen['x'][0]))[:, 64:].view(-1, 2, 16).transpose(0, 1)
    mixed = (weights @ values).transpose(0, 1).flatten(1)
    expected = seen['out'][0]
    torch.testing.assert_close(attn.proj(mixed), expected, atol=1e-5, rtol=1e-4)


def test_weights_of_a_vit_are_those_of_an_explicit_softmax():
    extractor = extractor_of(VIT | dict(cls_token=True))
    pixels = torch.tensor(IMAGE).permute(2, 0, 1).float()
    pixels = (pixels - extractor.mean) / extractor.std
    expected = extractor.backbone.eval().last_attention(pixels[None])[0]
    found = query_attention(extractor, IMAGE).weights
    torch.testing.assert_close(found, expected[:, 0, 1:])
    torch.testing.assert_close(all_rows(extractor), expected[:, 1:, 1:])


@pytest.mark.parametrize('registers', [0, 2])
def test_weights_of_timms_vit(registers):
    extractor = extractor_of(TIMM_VIT | dict(reg_tokens=registers, qk_norm=True))
    attn = extractor.backbone.model.blocks[-1].attn
    attn.fused_attn = False
    seen = {}
    attn.attn_drop.register_forward_hook(lambda _, args, out: seen.update(w=out[0]))
    found = query_attention(extractor, IMAGE).weights
    others = 1 + registers
    torch.testing.assert_close(found, seen['w'][:, 0, others:])
    rows = all_rows(extractor)
    torch.testing.assert_close(rows, seen['w'][:, others:, others:])


def from_windows(windows, grid, side, place):
    """``(nW, heads, n, n)`` put where a token's window and seat say, by loops."""
    tokens = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    across = -(-grid[1] // side)
    full = torch.zeros(windows.shape[1], len(tokens), len(tokens))

    def seat(token):
        row, column = place(*token)
        window = row // side * across + column // side
        return window, row % side * side + column % side

    for i, one in enumerate(tokens):
        for j, other in enumerate(tokens):
            (window, a), (same, b) = seat(one), seat(other)
            if window == same:
                full[:, i, j] = windows[window, :, a, b]
    return full


@pytest.mark.parametrize(
    ('blocks', 'side', 'shift'),
    [(1, 4, 0), (2, 4, 2), (2, 3, 1)],  # the second block's windows are shifted
)
def test_weights_of_swin_are_those_of_mmpretrains_windows(blocks, side, shift):
    arch = dict(embed_dims=8, depths=[1, blocks], num_heads=[1, 2])
    extractor = extractor_of(SWIN | dict(arch=arch, window_size=[4, side]))
    rows = all_rows(extractor)
    block = extractor.backbone.model.stages[-1].blocks[-1]
    assert block.attn.shift_size == shift
    block.attn.__class__ = ShiftWindowMSA  # the plain one, on filled-up windows
    seen = {}
    block.attn.w_msa.softmax.register_forward_hook(lambda _, x, w: seen.update(w=w))
    extractor(IMAGE[None])
    rows_filled, columns_filled = (-(-n // side) * side for n in (5, 7))

    def place(row, column):  # filled up, then shifted
        return (row - shift) % rows_filled, (column - shift) % columns_filled

    expected = from_windows(seen['w'], (5, 7), side, place)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    assert (rows.sum(-1) < 0.999).any()  # the filling gets its share
    assert (rows == 0).any() and (rows > 0).any()


def test_weights_of_timms_swin():
    extractor = extractor_of(TIMM_SWIN)
    rows = all_rows(extractor)
    block = extractor.backbone.model.layers[-1].blocks[-1]
    assert block.shift_size == (2, 2) and not block.attn.fused_attn
    seen = {}
    block.attn.softmax.register_forward_hook(lambda _, x, w: seen.update(w=w))
    extractor(IMAGE[None])

    def place(row, column):  # shifted on 5 x 7, then filled up
        return (row - 2) % 5, (column - 2) % 7

    expected = from_windows(seen['w'], (5, 7), 4, place)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)


def test_hooks_are_gone_and_modes_stay():
    extractor = extractor_of(VIT)
    extractor.backbone.train()
    query_attention(extractor, IMAGE)
    with pytest.raises(DenseSSLError, match='do not divide'):
        query_attention(extractor, IMAGE[:-1])
    modules = list(extractor.backbone.modules())
    assert all(part.training and not part._forward_hooks for part in modules)


def test_without_a_class_token_the_centre_asks():
    assert query_attention(extractor_of(VIT), IMAGE).query == 17  # row 2, column 3


def test_a_backbone_without_such_attention_says_so():
    extractor = extractor_of(dict(type='TimmBackbone', name='resnet10t'))
    with pytest.raises(DenseSSLError, match='ResNet has no attention'):
        query_attention(extractor, np.zeros((64, 64, 3), np.uint8))


# Mass and entropy


def test_entropies_in_closed_form():
    flat, one, two = torch.full((12,), 0.01), torch.zeros(12), torch.zeros(12)
    one[3], two[[0, 5]] = 0.7, 0.25
    expected = torch.tensor([math.log(12), 0.0, math.log(2)]).double()
    torch.testing.assert_close(entropies(torch.stack([flat, one, two])), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any),
    st.floats(0.01, 1.0),
)
def test_mass_mask_is_the_smallest_set_that_holds_the_mass(weights, mass):
    mask = mass_mask(torch.tensor([weights]).float(), mass)[0].tolist()
    total, inside = sum(weights), [w for w, m in zip(weights, mask, strict=True) if m]
    outside = [w for w, m in zip(weights, mask, strict=True) if not m]
    assert sum(inside) >= (mass - 1e-6) * total
    assert sum(inside) - min(inside) < mass * total  # none of them can be spared
    assert min(inside) >= max(outside, default=0) and min(inside) > 0


# Pictures


def test_planted_attention_is_drawn_where_it_lies():
    grid, image = (4, 6), np.full((80, 120, 3), 200, np.uint8)  # patches of 20 px
    weights = torch.zeros(2, 24)
    weights[0] = 0.01  # flat, after the focused one
    weights[1, [7, 8, 20]] = torch.tensor([0.5, 0.3, 0.2])
    sheet = attention_sheet(image, QueryAttention(weights, grid, None), mass=0.6)
    zoom, height, width = 2, 160, 240
    cell = height + TITLE_PX + GAP_PX
    assert sheet.shape == (cell + GAP_PX, 3 * (width + GAP_PX) + GAP_PX, 3)
    top = GAP_PX + TITLE_PX
    panels = [
        sheet[top : top + height, GAP_PX + i * (width + GAP_PX) :][:, :width]
        for i in range(3)
    ]
    assert (panels[0] == 200).all()
    focused = panels[1].reshape(4, 40, 6, 40, 3).swapaxes(1, 2)
    assert (focused == focused[:, :, :1, :1]).all() and zoom == 2
    colours = focused[:, :, 0, 0].reshape(24, 3)
    viridis = cv2.applyColorMap(np.array([[255, 153]], np.uint8), cv2.COLORMAP_VIRIDIS)[
        0, :, ::-1
    ]
    for patch, colour in zip((7, 8), viridis, strict=True):
        np.testing.assert_allclose(colours[patch], 0.7 * colour + 60, atol=1)
    others = [i for i in range(24) if i not in (7, 8)]
    assert (colours[others] == 70).all()  # 20 lies outside of 60 %
    flat = panels[2].reshape(4, 40, 6, 40, 3)[:, 0, :, 0].reshape(24, 3)
    assert (flat != 70).any(-1).sum() == 15  # 60 % of 24, rounded up


def test_query_patch_has_a_frame():
    image = framed(np.zeros((40, 60, 3), np.uint8), 8, (4, 6))  # row 1, column 2
    red = (image == (255, 40, 40)).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert rows.min() <= 10 <= rows.min() + 1 and 18 <= rows.max() <= 20
    assert columns.min() <= 20 <= columns.min() + 1 and 28 <= columns.max() <= 30
    assert not red[13:17, 23:27].any()


def test_points_fall_into_patches():
    assert [patch_at((x, 0.0), (4, 6)) for x in (0, 0.16, 0.17, 1)] == [0, 0, 1, 5]
    assert patch_at((0.99, 1.0), (4, 6)) == 23
    for point in ((-0.1, 0), (0, 1.2), (math.nan, 0)):
        with pytest.raises(DenseSSLError, match='outside the picture'):
            patch_at(point, (4, 6))


def test_panels_stand_in_rows_and_are_not_stretched():
    panels = [(str(i), np.full((30, 50, 3), 10 * i, np.uint8)) for i in range(5)]
    sheet = side_by_side(panels, per_row=2)
    down, across = 30 + TITLE_PX + GAP_PX, 50 + GAP_PX
    assert sheet.shape == (3 * down + GAP_PX, 2 * across + GAP_PX, 3)
    for i in range(5):
        y, x = GAP_PX + TITLE_PX + i // 2 * down, GAP_PX + i % 2 * across
        assert (sheet[y : y + 30, x : x + 50] == 10 * i).all()
    assert enlarged(np.zeros((30, 50, 3))).shape == (120, 200, 3)
    assert enlarged(np.zeros((30, 160, 3))).shape == (30, 160, 3)


def test_cosines_by_loops():
    patches = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    patches[1, 2] = 0  # without length
    found = cosines(patches, 4)
    query = patches[0, 4].double()
    for n in range(3):
        for i in range(6):
            each = patches[n, i].double()
            lengths = each.norm() * query.norm()
            expected = float(each @ query / lengths) if lengths else 0.0
            assert found[n, i] == pytest.approx(expected, abs=1e-6)
    patches[2, 0, 0] = math.inf
    with pytest.raises(DenseSSLError, match='not all finite'):
        cosines(patches, 4)


def test_similarity_compares_over_the_pictures():
    images = [np.full((80, 120, 3), value, np.uint8) for value in (100, 200)]
    values = torch.zeros(2, 24)
    values[0, 5], values[1, 3], values[1, 4] = 1.0, 1.0, -1.0
    first, second = similarity_sheets(images, values, 5, (4, 6))
    width = 240 + GAP_PX
    assert first.shape[1] == 2 * width + GAP_PX
    assert second.shape[1] == 3 * width + GAP_PX
    top = GAP_PX + TITLE_PX
    heat = second[top:-GAP_PX, 2 * width + GAP_PX : -GAP_PX]
    shares = np.array([0.5, 1.0, 0.0])  # of the ordinary, the query's like, the other
    shown = heat_over(images[1], (values[1].numpy() + 1) / 2, np.ones(24, bool), (4, 6))
    colours = heat.reshape(4, 40, 6, 40, 3)[:, 0, :, 0].reshape(24, 3)
    np.testing.assert_array_equal(heat[::2, ::2], shown)
    assert len(np.unique(colours, axis=0)) == len(shares)
    np.testing.assert_array_equal(
        second[top:-GAP_PX, GAP_PX:width], first[top:-GAP_PX, GAP_PX:width]
    )


# Commands


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """Checkpoints of a small run with ViT, of a Swin and timm's, and two scenes."""
    folder = tmp_path_factory.mktemp('home')
    model = build_model()
    for parameter in model.teacher.parameters():  # no longer the student's
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(steps_per_epoch=1),
        train_dataloader=SimpleNamespace(
            batch_sampler=SimpleNamespace(global_batch_size=1)
        ),
        seed=0,
        cfg=Config(dict(model=model_config())),
        model=model,
        optim_wrapper=optim_wrapper(model),
    )
    step = save_run(runner, 3, folder)
    scenes = [str(p) for p in DemoScenes(size=64).write_folder(folder, range(2))]
    return SimpleNamespace(
        folder=folder,
        step=str(step),
        backbone=str(folder / 'backbone.safetensors'),
        scenes=scenes,
        model=model,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_attention_command(home, tmp_path, capsys, monkeypatch):
    sheets = []
    monkeypatch.setattr(
        'densessl.visualization.frozen.attention_sheet',
        lambda *args: sheets.append(args) or attention_sheet(*args),
    )
    command = ['attention', home.step, *home.scenes, '--size', '48', '64']
    assert main([*command, '--query', '0.9,0.1', '--out', str(tmp_path)]) == 0
    assert names(tmp_path) == ['000_000000.png', '001_000001.png']
    out = capsys.readouterr().out.split()
    assert out == [str(tmp_path / name) for name in names(tmp_path)]
    (image, found, mass), _ = sheets
    assert (found.query, found.grid, mass) == (7, (6, 8), 0.6)
    teacher = FeatureExtractor(
        home.model.teacher.backbone, **home.model.data_preprocessor.normalization
    )
    expected = query_attention(teacher, image, (0.9, 0.1))
    torch.testing.assert_close(found.weights, expected.weights)
    scene = cv2.imread(home.scenes[0])[:, :, ::-1]
    scene = cv2.resize(scene, (64, 48), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(image, scene)


def test_attention_command_takes_timms_weights(home, tmp_path):
    name = 'vit_tiny_patch16_224'
    file = tmp_path / 'weights.safetensors'
    save_file(timm.create_model(name).state_dict(), file)
    command = ['attention', f'timm:{name}@{file}', home.scenes[0], '--size', '64']
    assert main([*command, '--out', str(tmp_path / 'out')]) == 0
    assert names(tmp_path / 'out') == ['000_000000.png']


def test_similarity_command(home, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        'densessl.visualization.frozen.similarity_sheets',
        lambda *args: seen.append(args) or similarity_sheets(*args),
    )
    command = ['similarity', home.backbone, *home.scenes, '--size', '64']
    assert main([*command, '--out', str(tmp_path)]) == 0
    assert names(tmp_path) == ['000_000000.png', '001_000001.png']
    (images, values, query, grid) = seen[0]
    assert (query, grid, values.shape) == (36, (8, 8), (2, 64))  # the centre
    assert values[0, 36] == pytest.approx(1, abs=1e-5) and len(images) == 2


def test_pca_command_shares_a_basis(home, tmp_path, monkeypatch):
    command = ['pca', home.backbone, *home.scenes, home.scenes[0], '--size', '64']
    assert main([*command, '--out', str(tmp_path)]) == 0
    assert names(tmp_path) == ['pca.png']
    sheet = cv2.imread(str(tmp_path / 'pca.png'))
    cells = [
        sheet[4 + y * 164 :][:160, 4 + x * 164 :][:, :160]
        for y in range(2)
        for x in range(4)
    ]
    np.testing.assert_array_equal(cells[1], cells[5])  # one picture, one colouring
    assert not np.array_equal(cells[1], cells[3])


@pytest.mark.parametrize(
    ('command', 'words'),
    [
        ('attention nothing.pth {scene}', ['nothing.pth', 'no such file']),
        ('attention {step} no.jpg', ["'no.jpg'", 'no such file']),
        ('attention {step} {scene} --size 60', ['--size 60', 'multiples of 8']),
        ('attention {step} {scene} --size 0', ['--size 0', 'multiples of 8']),
        ('pca {step} {scene} --size 8 8 8', ['--size 8 8 8', 'height and width']),
        ('attention {step} {scene} --query 3', ['--query 3', '0.5,0.25']),
        ('attention {step} {scene} --query 3,0', ['--query 3,0', 'outside']),
        ('similarity {step} {scene} --query=-1,0', ['--query -1,0', 'outside']),
        ('attention {step} {scene} --mass 0', ['--mass 0', 'above 0']),
        ('attention {step} {scene} --mass 1.5', ['--mass 1.5', 'at most 1']),
        ('pca {step} {scene} --out {scene}/x', ['cannot write', '--out']),
    ],
)
def test_mistakes_end_in_one_line(home, tmp_path, capsys, command, words):
    command = command.format(step=home.step, scene=home.scenes[0]).split()
    if '--out' not in command:
        command += ['--out', str(tmp_path / 'out')]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    for word in words:
        assert word in error
    assert not (tmp_path / 'out').exists()
