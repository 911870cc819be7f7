"""Matchers against loops over tokens, on views whose places are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.models import GeometricMatcher, SimilarityMatcher, ViewTokens
from densessl.models.matchers import build_matcher


def view(boxes, grid, flips=None, tokens=None):
    """Views ``(B, v)`` of pictures of 200 x 200 with a token for each cell."""
    flips = flips or [[False] * len(row) for row in boxes]
    size = [[(grid[0] * 16, grid[1] * 16)] * len(row) for row in boxes]
    source = [[(200, 200)] * len(row) for row in boxes]
    geometry = ViewGeometry.from_lists(boxes, flips, size, source)
    if tokens is None:
        tokens = torch.zeros(len(boxes), len(boxes[0]), grid[0] * grid[1], 1)
    return ViewTokens(tokens, grid, geometry)


def centers(box, flip, grid):
    """Token centres in the picture, by the definition of crop, resize and flip."""
    x, y, width, height = box
    rows, columns = grid
    found = []
    for r in range(rows):
        for c in range(columns):
            across = (c + 0.5) / columns
            across = 1 - across if flip else across
            found.append((x + across * width, y + (r + 0.5) / rows * height))
    return found


def test_the_same_view_matches_itself_and_a_mirrored_one_its_mirror():
    box = [[(10.0, 20.0, 80.0, 60.0)]]
    plain, mirrored = view(box, (3, 4)), view(box, (3, 4), [[True]])
    index, valid = GeometricMatcher()(plain, plain)
    assert index.tolist() == [[list(range(12))]] and valid.all()
    index, valid = GeometricMatcher()(plain, mirrored)
    assert index.tolist() == [[[3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8]]] and valid.all()


def test_threshold_is_half_the_larger_diagonal_and_strict():
    # cells of 10 x 10: the diagonal is 10 sqrt(2), a shift right by that / 2 too far
    limit = 5 * math.sqrt(2)
    teacher = view([[(0.0, 0.0, 40.0, 40.0)]], (4, 4))
    for shift, counts in ((limit - 1e-6, True), (limit + 1e-6, False)):
        student = view([[(30.0 + shift, 0.0, 10.0, 10.0)]], (1, 1))
        index, valid = GeometricMatcher()(student, teacher)
        assert index.item() == 3 and valid.item() == counts
    # a student with cells of 40 x 40 counts by its own, larger diagonal
    far = view([[(60.0, 0.0, 40.0, 40.0)]], (1, 1))
    _, valid = GeometricMatcher()(far, teacher)
    assert not valid.item()  # 45 to the right, 5 below: more than 28.3
    near = view([[(30.0, 0.0, 40.0, 40.0)]], (1, 1))
    assert GeometricMatcher()(near, teacher).valid.item()  # 15 and 5
    assert not GeometricMatcher(0.25)(near, teacher).valid.item()
    assert GeometricMatcher(None)(far, teacher).valid.item()


def test_views_that_do_not_meet_have_no_match():
    student = view([[(0.0, 0.0, 50.0, 50.0)]], (4, 4))
    teacher = view([[(120.0, 120.0, 50.0, 50.0)]], (4, 4))
    assert not GeometricMatcher()(student, teacher).valid.any()


boxes = st.tuples(
    st.integers(0, 90), st.integers(0, 90), st.integers(8, 110), st.integers(8, 110)
)
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=150, deadline=None)
@given(boxes, boxes, st.booleans(), st.booleans(), grids, grids)
def test_place_matches_are_the_nearest_and_never_farther_than_s(
    box, other, flip, other_flip, grid, other_grid
):
    student = view([[box]], grid, [[flip]])
    teacher = view([[other]], other_grid, [[other_flip]])
    index, valid = (x[0, 0].tolist() for x in GeometricMatcher()(student, teacher))
    ours, theirs = centers(box, flip, grid), centers(other, other_flip, other_grid)
    diagonals = [
        math.hypot(b[2] / g[1], b[3] / g[0])
        for b, g in ((box, grid), (other, other_grid))
    ]
    s = max(diagonals) / 2
    for point, i, counts in zip(ours, index, valid, strict=True):
        distances = [math.dist(point, q) for q in theirs]
        assert math.isclose(distances[i], min(distances), rel_tol=1e-9, abs_tol=1e-9)
        if counts:
            assert distances[i] < s * (1 + 1e-9)
        else:
            assert distances[i] > s * (1 - 1e-9)


def test_several_views_are_matched_each_by_its_own_geometry():
    rows = [[(0, 0, 90, 90), (20, 10, 60, 90)], [(5, 5, 30, 30), (100, 90, 80, 80)]]
    flips = [[False, True], [True, False]]
    teacher_rows, teacher_flips = (
        [[(10, 0, 80, 80)], [(90, 90, 100, 100)]],
        [[True], [False]],
    )
    together = GeometricMatcher()(
        view(rows, (3, 3), flips), view(teacher_rows, (4, 4), teacher_flips)
    )
    for b in range(2):
        for v in range(2):
            alone = GeometricMatcher()(
                view([[rows[b][v]]], (3, 3), [[flips[b][v]]]),
                view([teacher_rows[b]], (4, 4), [teacher_flips[b]]),
            )
            assert together.index[b, v].equal(alone.index[0, 0])
            assert together.valid[b, v].equal(alone.valid[0, 0])


def test_similarity_is_the_greatest_cosine():
    g = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 3, 6, 5, generator=g) * 7
    theirs = torch.randn(2, 1, 4, 5, generator=g)
    index, valid = SimilarityMatcher()(
        ViewTokens(ours, (2, 3)), ViewTokens(theirs, (2, 2))
    )
    assert index.shape == (2, 3, 6) and valid.all()
    for b in range(2):
        for v in range(3):
            for n in range(6):
                cosines = [
                    float(ours[b, v, n] @ q / (ours[b, v, n].norm() * q.norm()))
                    for q in theirs[b, 0]
                ]
                assert index[b, v, n] == cosines.index(max(cosines))


def test_similarity_is_float32_under_autocast():
    g = torch.Generator().manual_seed(1)
    ours, theirs = (
        torch.randn(1, 1, 400, 8, generator=g),
        torch.randn(1, 1, 300, 8, generator=g),
    )
    a, b = ViewTokens(ours, (20, 20)), ViewTokens(theirs, (20, 15))
    expected = SimilarityMatcher()(a, b).index
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert SimilarityMatcher()(a, b).index.equal(expected)


@pytest.mark.parametrize('matching', ['nearest', dict(type='NoMatcher')])
def test_unknown_matcher(matching):
    with pytest.raises(DenseSSLError, match=r'no matcher .*similarity.*TASK_UTILS'):
        build_matcher(matching)


def test_threshold_must_let_something_count():
    with pytest.raises(DenseSSLError, match='threshold=0 lets no match count'):
        build_matcher(dict(type='GeometricMatcher', threshold=0))
