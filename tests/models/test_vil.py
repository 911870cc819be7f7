"""ViL's attention against full attention with masks, in plain loops."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densessl.errors import DenseSSLError
from densessl.models.backbones import VisionLongformer
from densessl.models.backbones.vil import LongformerAttention
from densessl.schedules import Progress

WIDTH, HEADS, WINDOW = 8, 2, 3
AROUND = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
SMALL = dict(embed_dims=[8, 8, 16], depths=[2, 2, 2], num_heads=[1, 2, 2])


def attention(windowed=True, has_global=True, keep_global=True):
    torch.manual_seed(0)
    layer = LongformerAttention(
        WIDTH,
        HEADS,
        WINDOW,
        windowed=windowed,
        has_global=has_global,
        keep_global=keep_global,
    )
    for parameter in layer.parameters():  # biases that matter
        torch.nn.init.normal_(parameter)
    return layer.double()


def tokens(grid, has_global=True, batch=2):
    count = grid[0] * grid[1] + has_global
    return torch.randn(batch, count, WIDTH, dtype=torch.float64)


def masked_full_attention(layer, x, grid, reach, table=None):
    """Attention of all to all, then what ``reach`` forbids is struck out.

    Args:
        layer: whose weights to use.
        x: ``(B, T, C)``.
        grid: of the map.
        reach: from a query's and a key's window to whether the one sees the other.
        table: ``(heads, r, c)`` biases, where they are not the layer's.
    """
    table = layer.local_bias if table is None else table
    cells = list(itertools.product(range(grid[0]), range(grid[1])))
    if layer.has_global:
        cells.insert(0, None)
    bias = torch.full((HEADS, len(cells), len(cells)), -torch.inf, dtype=x.dtype)
    middle = (table.shape[1] // 2, table.shape[2] // 2)
    for (i, query), (j, key) in itertools.product(enumerate(cells), repeat=2):
        if query is None and key is None:
            bias[:, i, j] = 0
        elif query is None:
            bias[:, i, j] = layer.global_to_local if layer.keep_global else 0
        elif key is None:
            bias[:, i, j] = layer.local_to_global
        elif reach([c // WINDOW for c in query], [c // WINDOW for c in key]):
            dy, dx = key[0] - query[0], key[1] - query[1]
            bias[:, i, j] = table[:, middle[0] + dy, middle[1] + dx]
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=-1)
    heads = []
    for head, part in enumerate(torch.arange(WIDTH).chunk(HEADS)):
        scores = q[..., part] @ k[..., part].mT / len(part) ** 0.5 + bias[head]
        heads.append(scores.softmax(-1) @ v[..., part])
    out = torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias
    return out if layer.keep_global or not layer.has_global else out[:, 1:]


def near(query, key):
    return max(abs(query[0] - key[0]), abs(query[1] - key[1])) <= 1


GLOBALS = pytest.mark.parametrize(
    ('has_global', 'keep_global'), [(True, True), (True, False), (False, False)]
)


@GLOBALS
@pytest.mark.parametrize('grid', [(12, 12), (10, 13), (2, 7), (3, 1)])
def test_windows_equal_masked_full_attention(grid, has_global, keep_global):
    layer = attention(True, has_global, keep_global)
    x = tokens(grid, has_global)
    with torch.no_grad():
        expected = masked_full_attention(layer, x, grid, near)
        torch.testing.assert_close(layer(x, grid), expected)


@pytest.mark.parametrize('neighbour', range(8))
def test_one_neighbour_equals_masked_full_attention(neighbour):
    layer, grid = attention(), (8, 10)
    x = tokens(grid)
    dy, dx = AROUND[neighbour]

    def reach(query, key):
        return key in (query, [query[0] + dy, query[1] + dx])

    with torch.no_grad():
        expected = masked_full_attention(layer, x, grid, reach)
        torch.testing.assert_close(layer(x, grid, neighbour), expected)


def test_gradients_equal_those_of_masked_full_attention():
    layer, grid = attention(), (7, 5)
    x, weights = tokens(grid, batch=1).requires_grad_(), tokens(grid, batch=1)
    variables = [x, *layer.parameters()]
    ours = torch.autograd.grad((layer(x, grid) * weights).sum(), variables)
    expected = masked_full_attention(layer, x, grid, near)
    theirs = torch.autograd.grad((expected * weights).sum(), variables)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@GLOBALS
@pytest.mark.parametrize('grid', [(6, 6), (2, 5)])
def test_full_attention_has_the_same_biases(grid, has_global, keep_global):
    layer = attention(False, has_global, keep_global)
    x = tokens(grid, has_global)
    with torch.no_grad():
        expected = masked_full_attention(layer, x, grid, lambda *_: True)
        torch.testing.assert_close(layer(x, grid), expected)


def stretch(size_in, size_out):
    """Rows of bicubic weights (a = -0.75) with the ends on the ends."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        place = i * (size_in - 1) / (size_out - 1)
        for j in range(int(place) - 1, int(place) + 3):
            d, a = abs(place - j), -0.75
            near_part = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far_part = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), size_in - 1)] += near_part if d <= 1 else far_part
    return matrix


@pytest.mark.parametrize('grid', [(9, 9), (4, 8)])
def test_full_attention_on_a_larger_grid_stretches_the_table(grid):
    layer = attention(windowed=False)
    x, side = tokens(grid), 4 * WINDOW - 1
    rows = stretch(side, max(side, 2 * grid[0] - 1))
    columns = stretch(side, max(side, 2 * grid[1] - 1))
    with torch.no_grad():
        table = torch.einsum('ri,cj,hij->hrc', rows, columns, layer.local_bias)
        expected = masked_full_attention(layer, x, grid, lambda *_: True, table)
        torch.testing.assert_close(layer(x, grid), expected)


def test_a_change_reaches_the_windows_around_and_does_not_wrap():
    layer, grid = attention(keep_global=False), (12, 12)
    x = tokens(grid, batch=1)
    changed = x.clone()
    changed[:, 1] += 1  # the map's first token
    moved = (layer(x, grid) != layer(changed, grid)).any(-1).view(grid)
    assert moved[:6, :6].all() and moved.sum() == 36


def test_inner_windows_move_with_the_map():
    layer, grid = attention(), (15, 15)
    x = tokens(grid, batch=1)
    local = x[:, 1:].unflatten(1, grid)
    shifted = torch.cat([x[:, :1], local.roll((3, 3), (1, 2)).flatten(1, 2)], dim=1)
    out, out_shifted = (layer(y, grid)[:, 1:].unflatten(1, grid) for y in (x, shifted))
    # windows with all neighbours before and after the shift
    torch.testing.assert_close(out[:, 3:9, 3:9], out_shifted[:, 6:12, 6:12])


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return out


@pytest.mark.parametrize('windowed_stages', [0, 2])
def test_windowed_stages_have_no_attention_of_all_to_all(windowed_stages):
    arch = dict(embed_dims=[4, 4], depths=[2, 1], num_heads=[1, 1])
    model = VisionLongformer(arch, window_size=2, windowed_stages=windowed_stages)
    with Largest() as largest:
        model(torch.randn(1, 3, 128, 128)).patches.sum().backward()
    count = 32 * 32  # tokens of stage 1
    if windowed_stages:
        assert largest.size < count * count / 8
    else:
        assert largest.size > count * count


def test_windows_keep_no_copies_for_the_backward_pass():
    layer, grid = attention(), (12, 12)
    x = tokens(grid, batch=1)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, grid)
    assert 0 < sum(kept) < 9 * 2 * x.numel()  # what keys and values of 9 windows take


def test_last_block_of_a_stage_leaves_the_global_token_behind():
    model = VisionLongformer(SMALL, window_size=3, drop_path_rate=0.0)
    x = torch.randn(1, 1 + 6 * 6, 8)
    first, last = model.stages[0].blocks
    for block, start in ((first, 0), (last, 1)):
        attended = block.attn(block.norm1(x), (6, 6))
        expected = x[:, start:] + attended
        expected = expected + block.mlp(block.norm2(expected))
        torch.testing.assert_close(block(x, (6, 6), None), expected)


def test_stages():
    model = VisionLongformer(num_heads=(3, 6, 12, 24))
    for i, stage in enumerate(model.stages):
        assert (stage.global_token is None) == (i == 3)
        assert stage.embed.kernel_size == stage.embed.stride == ((2, 4)[i == 0],) * 2
        for block in stage.blocks:
            assert block.attn.windowed == (i < 2)
            assert block.attn.local_bias.shape == (3 * 2**i, 27, 27)
    heads = [s.blocks[0].attn.num_heads for s in VisionLongformer().stages]
    assert heads == [3, 3, 6, 12]


def test_positions_matter_by_their_biases_alone():
    model = VisionLongformer(SMALL, window_size=3).eval()
    images = torch.randn(1, 3, 64, 64)
    before = model(images).patches
    with torch.no_grad():
        for stage in model.stages:
            for block in stage.blocks:
                block.attn.local_bias.normal_()
    assert not before.allclose(model(images).patches)
    assert not [n for n, _ in model.named_parameters() if 'pos' in n]


def random_model(**options):
    torch.manual_seed(0)
    return VisionLongformer(
        SMALL, window_size=3, neighbours='random', drop_path_rate=0.0, **options
    )


def test_neighbours_are_drawn_for_three_quarters_of_the_training():
    model = random_model()

    def draw(step):
        torch.manual_seed(step)
        model.start_step(Progress(step, 100, 10))
        return model.neighbour

    drawn = [draw(step) for step in range(100)]
    assert set(drawn[:75]) == set(range(8)) and set(drawn[75:]) == {None}
    assert drawn == [draw(step) for step in range(100)]
    model.random_share = 0.1
    assert [draw(step) is None for step in range(20)] == [False] * 10 + [True] * 10


def test_all_neighbours_draw_nothing():
    model = random_model()
    model.neighbours = 'all'
    before = torch.get_rng_state()
    model.start_step(Progress(0, 100, 10))
    assert model.neighbour is None and before.equal(torch.get_rng_state())


def test_drawn_neighbour_holds_for_the_step_and_not_in_evaluation():
    model = random_model().train()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        every = model(images).patches
        outputs = []
        for model.neighbour in (0, 7):
            outputs.append(model(images).patches)
            assert model(images).patches.equal(outputs[-1])
        assert not outputs[0].allclose(outputs[1], atol=1e-4)
        assert not outputs[0].allclose(every, atol=1e-4)
        assert model.eval()(images).patches.equal(every)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(neighbours='some'), "found neighbours='some'; give 'all' or 'random'$"),
        (dict(random_share=75), 'found random_share=75; .* 0 to 1$'),
        (dict(num_heads=[1, 2]), 'each with one number a stage$'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(DenseSSLError, match=f'^VisionLongformer: .*{message}'):
        VisionLongformer(SMALL, **options)
