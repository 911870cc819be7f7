"""SelfPatch's neighbours against loops over patches and windows."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densessl.errors import DenseSSLError
from densessl.matching import (
    check_neighbourhood,
    neighbour_index,
    similar_neighbours,
    top_k_neighbours,
)

few = settings(deadline=None, max_examples=60)
sides = st.integers(1, 7)
grids = st.tuples(sides, sides).filter(lambda grid: grid[0] * grid[1] > 1)
windows = st.sampled_from([3, 5, 7, 'all', None])
borders = st.sampled_from(['wrap', 'clip'])


def neighbours_by_hand(grid, window, border):
    """Per patch, the list of its neighbours in the order they are first met."""
    h, w = grid
    found = []
    for row, column in itertools.product(range(h), range(w)):
        mine = []
        reach = 0 if window in ('all', None) else window // 2
        for y in range(row - reach, row + reach + 1):
            for x in range(column - reach, column + reach + 1):
                if border == 'wrap':
                    patch = (y % h) * w + x % w
                elif 0 <= y < h and 0 <= x < w:
                    patch = y * w + x
                else:
                    continue
                if patch != row * w + column and patch not in mine:
                    mine.append(patch)
        if not reach:
            mine = [patch for patch in range(h * w) if patch != row * w + column]
        found.append(mine)
    return found


def picked(index, valid):
    """Per row, the indices that are valid."""
    return [row[mask].tolist() for row, mask in zip(index, valid, strict=True)]


@few
@given(grids, windows, borders)
def test_neighbours_are_those_of_the_loops(grid, window, border):
    index, valid = neighbour_index(grid, window, border)
    n = grid[0] * grid[1]
    assert index.shape == valid.shape
    assert index.shape == (n, n - 1 if window in ('all', None) else window**2 - 1)
    assert ((index >= 0) & (index < n)).all()
    assert picked(index, valid) == neighbours_by_hand(grid, window, border)


@few
@given(grids, windows, borders)
def test_never_itself_and_never_twice(grid, window, border):
    for patch, mine in enumerate(picked(*neighbour_index(grid, window, border))):
        assert patch not in mine
        assert len(mine) == len(set(mine)) > 0


def test_clipped_window_has_3_5_or_8_neighbours():
    _, valid = neighbour_index((4, 5), 3, 'clip')
    assert valid.sum(1).view(4, 5).tolist() == [
        [3, 5, 5, 5, 3],
        [5, 8, 8, 8, 5],
        [5, 8, 8, 8, 5],
        [3, 5, 5, 5, 3],
    ]


def test_wrapped_window_has_8_neighbours_across_the_edge():
    index, valid = neighbour_index((3, 4), 3)
    assert valid.all()
    # Around patch 0 of 0 1 2 3 / 4 5 6 7 / 8 9 10 11, from its upper left.
    assert index[0].tolist() == [11, 8, 9, 3, 1, 7, 4, 5]


@pytest.mark.parametrize('n', range(1, 7))
def test_two_rows_wrap_onto_each_other_once(n):
    _, valid = neighbour_index((2, n), 3, 'wrap')
    columns = min(n, 3)  # the two rows of 1, 2 or 3 distinct columns, less itself
    assert (valid.sum(1) == 2 * columns - 1).all()


def test_a_cached_index_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        index, _ = neighbour_index((5, 9), 3)
    features = torch.randn(45, 2, requires_grad=True)
    features.gather(0, index[:, :2]).sum().backward()
    assert features.grad.sum() == 90
    assert neighbour_index([5, 9], 3, 'wrap', 'cpu')[0] is index


@st.composite
def neighbourhoods(draw):
    grid, window, border = draw(grids), draw(windows), draw(borders)
    k = draw(st.integers(1, max(map(len, neighbours_by_hand(grid, window, border)))))
    return grid, window, border, k, draw(st.integers(0, 2**31))


@few
@given(neighbourhoods())
def test_top_k_are_the_most_similar_of_the_loops(neighbourhood):
    grid, window, border, k, seed = neighbourhood
    n = grid[0] * grid[1]
    features = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(seed))
    index, valid = top_k_neighbours(features, grid, k, window, border)
    assert index.shape == valid.shape == (2, n, k)
    by_hand = neighbours_by_hand(grid, window, border)
    for b, i in itertools.product(range(2), range(n)):

        def cosine(j, b=b, i=i):
            one, other = features[b, i].tolist(), features[b, j].tolist()
            dot = sum(map(float.__mul__, one, other))
            return dot / (math.hypot(*one) * math.hypot(*other))

        expected = sorted(by_hand[i], key=cosine, reverse=True)[:k]
        mask = [True] * len(expected) + [False] * (k - len(expected))
        assert valid[b, i].tolist() == mask
        found = index[b, i][valid[b, i]].tolist()
        assert set(found) <= set(by_hand[i])
        assert len(set(found)) == len(found)
        # By value: two neighbours may be as similar as float32 can tell.
        assert [cosine(j) for j in found] == pytest.approx(
            [cosine(j) for j in expected], abs=1e-5
        )


@pytest.mark.parametrize('k', range(1, 9))
@pytest.mark.parametrize('border', ['wrap', 'clip'])
def test_planted_neighbours_are_found_in_order(k, border):
    """On the 3 x 3 grid, patch 4's similarity to patch j falls with j."""
    angle = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0, 0.5, 0.6, 0.7, 0.8])
    features = torch.stack([angle.cos(), angle.sin()], -1)[None]
    index, valid = top_k_neighbours(features, (3, 3), k, 3, border)
    assert valid[0, 4].all()
    assert index[0, 4].tolist() == [0, 1, 2, 3, 5, 6, 7, 8][:k]


@few
@given(neighbourhoods())
def test_length_of_features_does_not_matter(neighbourhood):
    grid, window, border, k, seed = neighbourhood
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, math.prod(grid), 8, generator=generator)
    # Powers of two: no rounding, so that even near ties keep their order.
    exponents = torch.randint(-20, 21, (math.prod(grid), 1), generator=generator)
    before = top_k_neighbours(features, grid, k, window, border)
    after = top_k_neighbours(features * 2.0**exponents, grid, k, window, border)
    assert all(map(torch.equal, before, after))


@few
@given(neighbourhoods())
def test_of_equals_the_first_of_the_window_comes_first(neighbourhood):
    """One-hot features: every similarity is exactly 0 or 1, so ties are everywhere."""
    grid, window, border, k, seed = neighbourhood
    n = grid[0] * grid[1]
    kinds = torch.randint(3, (2, n), generator=torch.Generator().manual_seed(seed))
    features = torch.nn.functional.one_hot(kinds).float()
    index, valid = top_k_neighbours(features, grid, k, window, border)
    by_hand = neighbours_by_hand(grid, window, border)
    for b, i in itertools.product(range(2), range(n)):
        same = [j for j in by_hand[i] if kinds[b, i] == kinds[b, j]]
        rest = [j for j in by_hand[i] if kinds[b, i] != kinds[b, j]]
        assert index[b, i][valid[b, i]].tolist() == (same + rest)[:k]


@pytest.mark.parametrize('window', [3, 'all'])
def test_autocast_does_not_blur_similarities(window):
    """Neighbours whose cosines differ by 1e-4, below the steps of bfloat16."""
    angle = torch.arange(9) * 2e-2
    features = torch.stack([angle.cos(), angle.sin()], -1)[None]
    with torch.autocast('cpu', torch.bfloat16):
        index, _ = top_k_neighbours(features, (3, 3), 8, window)
    assert index[0, 8].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_images_do_not_mix_when_all_patches_are_compared_in_parts(monkeypatch):
    features = torch.randn(5, 12, 4, generator=torch.Generator().manual_seed(0))
    whole, _ = top_k_neighbours(features, (3, 4), 5, 'all')
    monkeypatch.setattr('densessl.matching._MAX_SIMILARITIES', 2 * 144)
    parts, _ = top_k_neighbours(features, (3, 4), 5, 'all')
    assert torch.equal(whole, parts)
    for b in range(5):
        alone, _ = top_k_neighbours(features[b : b + 1], (3, 4), 5, 'all')
        assert torch.equal(whole[b : b + 1], alone)


def test_half_precision_features_are_compared_as_float32():
    features = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    features = features.bfloat16()
    index, _ = top_k_neighbours(features, (3, 3), 8)
    again, _ = top_k_neighbours(features.float(), (3, 3), 8)
    assert torch.equal(index, again)


@pytest.mark.parametrize('window', [3, 'all'])
def test_nothing_is_kept_for_a_backward_pass(window):
    def refuse(tensor):
        raise AssertionError(f'{tuple(tensor.shape)} was kept')

    features = torch.randn(1, 9, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor):
        index, _ = top_k_neighbours(features, (3, 3), 4, window)
    assert not index.requires_grad


@pytest.mark.parametrize(
    ('grid', 'k', 'window', 'border', 'message'),
    [
        (
            (6, 6),
            9,
            3,
            'wrap',
            'SelfPatch: k=9 is more than the 8 neighbours of a 3x3 window; '
            'lower top_k or enlarge window',
        ),
        ((6, 6), 0, 3, 'wrap', 'top_k >= 1'),
        ((6, 6), 4, 4, 'wrap', 'window=4 .* odd'),
        ((6, 6), 4, 1, 'clip', 'window=1 .* 3 or more'),
        ((6, 6), 4, 'every', 'clip', "window='every' .* or 'all'"),
        ((6, 6), 4, 3, 'reflect', "border='reflect' is unknown; use 'wrap' or 'clip'"),
        ((1, 1), 1, 3, 'wrap', '1x1 grid has no neighbour; enlarge the crop'),
        ((1, 1), 1, 'all', 'wrap', '1x1 grid has no neighbour; enlarge the crop'),
        ((2, 2), 4, 3, 'wrap', 'the 3 neighbours .* 2x2 grid .* smaller patch size'),
        ((2, 9), 6, 3, 'clip', 'the 5 neighbours .* 2x9 grid .* enlarge the crop'),
        ((3, 3), 9, 'all', 'wrap', 'the 8 neighbours .* 3x3 grid .* lower top_k'),
        ((3, 3), 9, 5, 'clip', 'the 8 neighbours .* 3x3 grid .* lower top_k'),
    ],
)
def test_wrong_options_end_in_one_line(grid, k, window, border, message):
    with pytest.raises(DenseSSLError, match=message) as error:
        top_k_neighbours(torch.zeros(1, math.prod(grid), 2), grid, k, window, border)
    assert '\n' not in str(error.value)


@few
@given(grids, windows, borders)
def test_k_is_refused_exactly_when_no_patch_has_k_neighbours(grid, window, border):
    most = max(map(len, neighbours_by_hand(grid, window, border)))
    features = torch.zeros(1, math.prod(grid), 2)
    _, valid = top_k_neighbours(features, grid, most, window, border)
    assert valid.all(-1).any()
    with pytest.raises(DenseSSLError, match=f'k={most + 1} is more than'):
        top_k_neighbours(features, grid, most + 1, window, border)


def test_options_are_checked_before_any_grid_is_known():
    for k, window in ((8, 3), (24, 5), (500, 'all')):
        check_neighbourhood(k, window, 'clip')
    for k, window, border in ((9, 3, 'wrap'), (4, 6, 'wrap'), (4, 3, 'mirror')):
        with pytest.raises(DenseSSLError):
            check_neighbourhood(k, window, border)


def test_tokens_must_fill_the_grid():
    with pytest.raises(ValueError, match='37 tokens do not fill a 6x6 grid'):
        top_k_neighbours(torch.zeros(1, 37, 2), (6, 6), 4)


@few
@given(
    grids,
    st.sampled_from([3, 5, 7]),
    borders,
    st.floats(-1, 1),
    st.integers(0, 2**31),
)
def test_similar_neighbours_are_those_of_the_loops(
    grid, window, border, threshold, seed
):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, math.prod(grid), 3, generator=generator).double()
    index, valid = similar_neighbours(features, grid, threshold, window, border)
    assert index.shape == valid.shape == (2, math.prod(grid), window**2 - 1)
    by_hand = neighbours_by_hand(grid, window, border)
    for b, i in itertools.product(range(2), range(math.prod(grid))):
        cosine = {}
        for j in by_hand[i]:
            one, other = features[b, i].tolist(), features[b, j].tolist()
            dot = sum(map(float.__mul__, one, other))
            cosine[j] = dot / (math.hypot(*one) * math.hypot(*other))
        expected = [j for j in by_hand[i] if cosine[j] > threshold]
        if not expected:
            expected = [max(by_hand[i], key=cosine.get)]
        assert index[b, i][valid[b, i]].tolist() == expected


def test_a_patch_like_nobody_has_its_most_similar_neighbour():
    """Right angles but for one pair; of equals the first of the window."""
    features = torch.eye(9)[None]
    features[0, 4, 7] = 0.1
    index, valid = similar_neighbours(features, (3, 3), 0.95, 3, 'clip')
    assert index[0, 4][valid[0, 4]].tolist() == [7]
    assert index[0, 0][valid[0, 0]].tolist() == [1]
    assert valid.sum(-1).eq(1).all()


def test_equal_patches_are_all_positive():
    _, valid = similar_neighbours(torch.ones(1, 12, 4), (3, 4), 0.95, 3, 'clip')
    assert valid.sum(-1).view(3, 4).tolist() == [
        [3, 5, 5, 3],
        [5, 8, 8, 5],
        [3, 5, 5, 3],
    ]


def test_a_cosine_equal_to_the_threshold_is_not_over_it():
    features = torch.ones(1, 9, 4)
    features[0, 4, 2:] = -1  # at right angles to all others: cosine exactly 0
    _, valid = similar_neighbours(features, (3, 3), 0.0, 3, 'clip')
    assert valid[0, 4].sum() == 1
    _, valid = similar_neighbours(features, (3, 3), -1e-6, 3, 'clip')
    assert valid[0, 4].sum() == 8


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(threshold=1.5), 'threshold=1.5 is no cosine'),
        (dict(window='all'), "'adaptive' looks at a window"),
        (dict(window=4), 'window=4 .* odd'),
        (dict(border='mirror'), "border='mirror' is unknown"),
    ],
)
def test_wrong_options_of_an_adaptive_number(options, words):
    for call in (
        lambda: similar_neighbours(torch.zeros(1, 36, 2), (6, 6), **options),
        lambda: check_neighbourhood(
            'adaptive', **dict(window=3, border='wrap') | options
        ),
    ):
        with pytest.raises(DenseSSLError, match=words) as caught:
            call()
        assert '\n' not in str(caught.value)
    with pytest.raises(DenseSSLError, match="top_k='most' is unknown; use a number"):
        check_neighbourhood('most', 3, 'wrap')
    with pytest.raises(ValueError, match='37 tokens do not fill a 6x6 grid'):
        similar_neighbours(torch.zeros(1, 37, 2), (6, 6))
