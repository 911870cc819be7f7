"""ViewGeometry against pictures whose pixels say where they are.

The oracle cuts, flips and enlarges such pictures with numpy alone, in units of a
quarter source pixel so that boxes may start and end between pixels.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densessl.geometry import ViewGeometry

UNIT = 0.25  # source px per unit of the oracle
HEIGHT, WIDTH = 10, 13  # source image, px
ROWS, COLUMNS = int(HEIGHT / UNIT), int(WIDTH / UNIT)

few = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Cut:
    """A view of ``grid`` cells of ``cell`` units each, enlarged ``zoom`` times."""

    x: int
    y: int
    grid: tuple[int, int]
    cell: tuple[int, int]
    zoom: int
    flip: bool

    @property
    def extent(self):
        return self.grid[0] * self.cell[0], self.grid[1] * self.cell[1]

    def of(self, picture):
        """The view's pixels, cut from a (ROWS, COLUMNS, ...) picture."""
        view = picture[self.y : self.y + self.extent[0]]
        view = view[:, self.x : self.x + self.extent[1]]
        view = view[:, ::-1] if self.flip else view
        return view.repeat(self.zoom, axis=0).repeat(self.zoom, axis=1)

    def patches(self, view):
        """(N, patch pixels, ...) of a view's pixels."""
        h, w = self.grid
        bands = (band for row in np.split(view, h) for band in np.split(row, w, axis=1))
        return np.stack([b.reshape(-1, *b.shape[2:]) for b in bands])

    @property
    def geometry(self):
        height, width = self.extent
        box = [self.x * UNIT, self.y * UNIT, width * UNIT, height * UNIT]
        size = [height * self.zoom, width * self.zoom]
        return ViewGeometry.from_lists([box], [self.flip], [size], [[HEIGHT, WIDTH]])[0]


@st.composite
def cuts(draw):
    """Cuts anywhere in the source, often at its borders."""
    h, w = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    cell = draw(st.integers(1, ROWS // h)), draw(st.integers(1, COLUMNS // w))
    last_y, last_x = ROWS - h * cell[0], COLUMNS - w * cell[1]
    y = draw(st.one_of(st.just(0), st.just(last_y), st.integers(0, last_y)))
    x = draw(st.one_of(st.just(0), st.just(last_x), st.integers(0, last_x)))
    return Cut(x, y, (h, w), cell, draw(st.integers(1, 3)), draw(st.booleans()))


def place_picture():
    """(ROWS, COLUMNS, 2): every pixel holds its own centre (x, y) in source px."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    return np.stack([x + 0.5, y + 0.5], -1) * UNIT


def painted(cut):
    """(ROWS, COLUMNS) bool, the pixels that the cut sees."""
    canvas = np.zeros((ROWS, COLUMNS), bool)
    canvas[cut.y : cut.y + cut.extent[0], cut.x : cut.x + cut.extent[1]] = True
    return canvas


def patch_picture(cut):
    """(ROWS, COLUMNS): the raster index of the cut's patch that sees a pixel, or -1."""
    h, w = cut.grid
    seen = np.arange(h * w).reshape(h, w).repeat(cut.cell[0], 0).repeat(cut.cell[1], 1)
    canvas = np.full((ROWS, COLUMNS), -1)
    canvas[painted(cut)] = (seen[:, ::-1] if cut.flip else seen).ravel()
    return canvas


@few
@given(cuts())
def test_token_centers_are_the_mean_place_of_each_patch(cut):
    expected = cut.patches(cut.of(place_picture())).mean(1)
    found = cut.geometry.token_centers(cut.grid)
    # Quarters and eighths of a pixel: both are exact, so no tolerance.
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize('flip', [False, True])
def test_token_centers_of_a_resampled_crop(flip):
    """A 40 x 61 crop resized to 224 by OpenCV, in 14 x 14 patches."""
    y, x = np.mgrid[:100, :120]
    places = np.stack([x + 0.5, y + 0.5], -1)[25:65, 50:111]
    view = cv2.resize(places, (224, 224), interpolation=cv2.INTER_LINEAR)
    view = view[:, ::-1] if flip else view
    means = view.reshape(14, 16, 14, 16, 2).mean((1, 3))
    geometry = ViewGeometry.from_lists(
        [[50, 25, 61, 40]], [flip], [[224, 224]], [[100, 120]]
    )
    found = geometry.token_centers((14, 14))[0].numpy().reshape(14, 14, 2)
    # At the crop's edge resampling repeats the outermost pixel: look inside.
    np.testing.assert_allclose(found[1:-1, 1:-1], means[1:-1, 1:-1], atol=1e-3)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1, 500), st.floats(0, 500))
@few
def test_a_flip_mirrors_the_centers_bit_for_bit(h, w, width, x):
    boxes = [[x, 3.7, width, 41.3]] * 2
    geometry = ViewGeometry.from_lists(
        boxes, [False, True], [[64, 64]] * 2, [[9, 9]] * 2
    )
    straight, mirrored = geometry.token_centers((h, w)).view(2, h, w, 2)
    assert torch.equal(straight, mirrored.flip(1))


@few
@given(cuts())
def test_token_diagonal_is_the_distance_of_diagonal_neighbours(cut):
    h, w = cut.grid
    diagonal = cut.geometry.token_diagonal(cut.grid).item()
    if h > 1 and w > 1:
        centers = cut.patches(cut.of(place_picture())).mean(1).reshape(h, w, 2)
        apart = np.linalg.norm(centers[1:, 1:] - centers[:-1, :-1], axis=-1)
        np.testing.assert_allclose(apart, diagonal, atol=1e-9)


def test_token_diagonal_of_a_3_by_4_cell_is_5():
    geometry = ViewGeometry.from_lists([[7, 9, 12, 20]], [True], [[5, 5]], [[90, 90]])
    assert geometry.token_diagonal((5, 4)).tolist() == [5.0]
    assert geometry.token_diagonal((1, 1)).tolist() == [pytest.approx(544**0.5)]


@few
@given(cuts())
def test_view_points_land_on_the_source_pixel_the_view_shows(cut):
    view = cut.of(place_picture())  # values: centres of the source's units
    rows, columns = view.shape[:2]
    y, x = np.mgrid[:rows, :columns]
    points = np.stack([(x + 0.5) / columns, (y + 0.5) / rows], -1).reshape(-1, 2)
    landed = cut.geometry.to_source(torch.from_numpy(points)).numpy()
    units = np.floor(landed / UNIT)
    np.testing.assert_array_equal((units + 0.5) * UNIT, view.reshape(-1, 2))


@few
@given(cuts())
def test_source_points_are_seen_where_the_view_shows_them(cut):
    """Every pixel of the source is looked up by value in the view's pixels."""
    cut = Cut(cut.x, cut.y, cut.grid, cut.cell, 1, cut.flip)
    numbers = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    view = cut.of(numbers)
    order = view.ravel().argsort()
    y, x = np.divmod(order, view.shape[1])
    expected = np.stack([(x + 0.5) / view.shape[1], (y + 0.5) / view.shape[0]], -1)
    points = place_picture().reshape(-1, 2)[view.ravel()[order]]
    found = cut.geometry.to_view(torch.from_numpy(points)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@few
@given(cuts(), st.lists(st.tuples(st.floats(-1, 2), st.floats(-1, 2)), min_size=1))
def test_to_view_undoes_to_source(cut, points):
    points = torch.tensor(points, dtype=torch.float64)
    there_and_back = cut.geometry.to_view(cut.geometry.to_source(points))
    # One source px of rounding (1e-14) is up to 1 / 0.25 of the smallest view.
    torch.testing.assert_close(there_and_back, points, rtol=0, atol=1e-12)


def test_a_shared_point_has_one_place_in_every_view():
    boxes = [[10, 20, 100, 50], [60, 30, 40, 90], [5, 5, 200, 200]]
    geometry = ViewGeometry.from_lists(
        boxes, [False, True, True], [[224, 224]] * 3, [[300, 300]] * 3
    )
    point = torch.tensor([[70.0, 45.0]], dtype=torch.float64)
    seen = geometry.to_view(point)
    expected = [[0.6, 0.5], [0.75, 1 / 6], [0.675, 0.2]]  # (x, y), by hand
    torch.testing.assert_close(seen[:, 0], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(geometry.to_source(seen), point.expand(3, 1, 2))


@few
@given(cuts())
def test_contains_is_what_the_cut_paints(cut):
    centers = torch.from_numpy(place_picture().reshape(-1, 2))
    corners = centers - UNIT / 2  # a pixel holds its upper left corner, not the others
    expected = painted(cut).ravel()
    assert (cut.geometry.contains(centers).numpy() == expected).all()
    assert (cut.geometry.contains(corners).numpy() == expected).all()


@few
@given(cuts(), cuts())
def test_overlap_is_what_both_paint(first, second):
    both = painted(first) & painted(second)
    x, y, width, height = first.geometry.overlap(second.geometry).tolist()
    area = first.geometry.overlap_area(second.geometry).item()
    assert area == both.sum() * UNIT**2
    if both.any():
        rows, columns = np.nonzero(both)
        assert [x / UNIT, y / UNIT] == [columns.min(), rows.min()]
        assert width / UNIT == columns.max() - columns.min() + 1
        assert height / UNIT == rows.max() - rows.min() + 1
    else:
        assert [width, height] == [0, 0]


@few
@given(cuts(), cuts())
def test_greatest_overlap_patch_by_counting_pixels(query, reference):
    """The chosen patch shares the most pixels; -1 exactly if the centre is outside."""
    # Twice the units, so that patch centres fall between pixels or on their corners.
    labels = patch_picture(reference).repeat(2, 0).repeat(2, 1)
    mine = patch_picture(query).repeat(2, 0).repeat(2, 1)
    found = query.geometry.greatest_overlap_patch(
        reference.geometry, query.grid, reference.grid
    ).tolist()
    assert len(found) == query.grid[0] * query.grid[1]
    for patch, chosen in enumerate(found):
        rows, columns = np.nonzero(mine == patch)
        middle = (
            (rows.min() + rows.max() + 1) // 2,
            (columns.min() + columns.max() + 1) // 2,
        )
        if labels[middle] < 0:
            assert chosen == -1
            continue
        shared = labels[mine == patch]
        counts = np.bincount(shared[shared >= 0])
        assert counts[chosen] == counts.max()


@few
@given(st.integers(0, 2**31))
def test_greatest_overlap_patch_of_a_focal_view_by_areas(seed):
    """LOCA's grids on crops that start anywhere, against all areas of patch pairs."""
    rng = np.random.default_rng(seed)
    boxes = [[*rng.uniform(0, 60, 2), *rng.uniform(lo, 2 * lo, 2)] for lo in (40, 90)]
    flips = (rng.random(2) < 0.5).tolist()
    query, reference = ViewGeometry.from_lists(
        boxes, flips, [[96, 96], [224, 224]], [[240, 240]] * 2
    )
    found = query.greatest_overlap_patch(reference, (6, 6), (14, 14)).view(6, 6)

    def shared(axis):  # (6, 14) lengths that query cells share with reference cells
        spans = []
        for box, flip, n in zip(boxes, flips, (6, 14), strict=True):
            step = box[2 + axis] / n
            start = box[axis] + step * np.arange(n)
            start = start[::-1] if axis == 0 and flip else start
            spans.append((start, start + step))
        (start, end), (other_start, other_end) = spans
        last = np.minimum.outer(end, other_end)
        return (last - np.maximum.outer(start, other_start)).clip(0)

    areas = shared(1)[:, None, :, None] * shared(0)[None, :, None, :]
    areas = areas.reshape(6, 6, 14 * 14)
    for row, column in np.ndindex(6, 6):
        chosen = found[row, column].item()
        if chosen >= 0:
            assert areas[row, column, chosen] >= areas[row, column].max() - 1e-9
        else:  # its centre is outside: less than half of it can be inside
            cell = np.prod(boxes[0][2:]) / 36
            assert areas[row, column].sum() <= cell / 2 + 1e-9


def test_a_centre_on_the_edge_is_inside_the_view_that_starts_there():
    """Patch 3 has its centre at 3.5 x 11.25 / 5 = 7.875; 3.5 / 5 first would round."""
    query, ends, starts = ViewGeometry.from_lists(
        [[0, 0, 11.25, 5], [0, 0, 7.875, 5], [7.875, 0, 9, 5]],
        [False] * 3,
        [[64, 64]] * 3,
        [[20, 20]] * 3,
    )
    before = query.greatest_overlap_patch(ends, (1, 5), (1, 1))
    after = query.greatest_overlap_patch(starts, (1, 5), (1, 1))
    assert before.tolist() == [0, 0, 0, -1, -1]
    assert after.tolist() == [-1, -1, -1, 0, 0]


def test_greatest_overlap_patch_of_the_same_crop_is_the_identity_or_its_mirror():
    box = [3.3, 1.7, 71.9, 53.1]
    first, second = ViewGeometry.from_lists(
        [box, box], [False, True], [[224, 224]] * 2, [[99, 99]] * 2
    )
    identity = torch.arange(14 * 14)
    mirror = identity.view(14, 14).flip(1).flatten()
    for query, reference, expected in (
        (first, first, identity),
        (second, second, identity),
        (first, second, mirror),
        (second, first, mirror),
    ):
        found = query.greatest_overlap_patch(reference, (14, 14), (14, 14))
        assert torch.equal(found, expected)


@few
@given(st.lists(cuts(), min_size=4, max_size=4))
def test_leading_shapes_broadcast_to_what_each_pair_says(drawn):
    batch = ViewGeometry.stack(
        [
            ViewGeometry.stack([drawn[0].geometry, drawn[1].geometry]),
            ViewGeometry.stack([drawn[2].geometry, drawn[3].geometry]),
        ]
    )
    assert (batch.shape, len(batch)) == ((2, 2), 2)
    one, other = batch[:, :, None], batch[:, None, :]  # (2, 2, 1) against (2, 1, 2)
    boxes, area = one.overlap(other), one.overlap_area(other)
    patches = one.greatest_overlap_patch(other, (3, 2), (2, 4))
    centers = batch.token_centers((3, 2))
    inside = other.contains(centers[:, :, None])
    seen = other.to_view(centers[:, :, None])
    assert patches.shape == inside.shape == (2, 2, 2, 6)
    for b, i, j in np.ndindex(2, 2, 2):
        mine, yours = drawn[2 * b + i].geometry, drawn[2 * b + j].geometry
        for field in ('box', 'flip', 'size', 'source'):
            assert torch.equal(getattr(batch, field)[b, i], getattr(mine, field))
        assert torch.equal(boxes[b, i, j], mine.overlap(yours))
        assert torch.equal(area[b, i, j], mine.overlap_area(yours))
        expected = mine.greatest_overlap_patch(yours, (3, 2), (2, 4))
        assert torch.equal(patches[b, i, j], expected)
        points = mine.token_centers((3, 2))
        assert torch.equal(inside[b, i, j], yours.contains(points))
        assert torch.equal(seen[b, i, j], yours.to_view(points))


def test_indexing_follows_the_leading_axes_alone():
    boxes = torch.arange(1, 25, dtype=torch.float64).view(2, 3, 4)
    flips = [[True, False, False], [False, True, True]]
    sizes = torch.arange(12).view(2, 3, 2)
    batch = ViewGeometry.from_lists(boxes, flips, sizes, sizes + 100)
    for index in (
        1,
        (1, 2),
        (..., 0),
        (slice(None), slice(1, None)),
        (0, [2, 0]),
        None,
    ):
        part = batch[index]
        expected = torch.arange(6).view(2, 3)[index]  # number of each view
        assert part.shape == expected.shape
        assert torch.equal(part.box, boxes.view(6, 4)[expected])
        assert torch.equal(part.flip, torch.tensor(flips).view(6)[expected])
        assert torch.equal(part.size, sizes.view(6, 2)[expected])
        assert torch.equal(part.source, sizes.view(6, 2)[expected] + 100)
    with pytest.raises(IndexError):
        batch[0, 0, 0]  # not the x of a box
    assert [view.flip.tolist() for view in batch] == flips


def test_float32_boxes_stay_float32():
    boxes = [[1.5, 2.5, 30, 40], [9.25, 8, 10, 12]]
    exact = ViewGeometry.from_lists(
        boxes, [True, False], [[96, 96]] * 2, [[60, 60]] * 2
    )
    single = exact.to(dtype=torch.float32)
    assert (single.size.dtype, single.flip.dtype) == (torch.int64, torch.bool)
    points = torch.tensor([[12.0, 13.0]])
    for name in ('to_source', 'to_view'):
        found = getattr(single, name)(points)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), getattr(exact, name)(points.double())
        )
    for pair in (
        (single.token_centers((6, 6)), exact.token_centers((6, 6))),
        (single.overlap(single[:1]), exact.overlap(exact[:1])),
    ):
        assert pair[0].dtype == torch.float32
        torch.testing.assert_close(pair[0].double(), pair[1])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'box': [[0, 0, 0, 5]]}, 'box is empty or not a number'),
        ({'box': [[0, 0, 5, float('nan')]]}, 'box is empty or not a number'),
        ({'box': [[0, 0, 5, 5]] * 2}, r'box is \(2, 4\), not \(1, 4\)'),
        ({'size': [[224]]}, r'size is \(1, 1\), not \(1, 2\)'),
        ({'source': [224, 224]}, r'source is \(2,\), not \(1, 2\)'),
    ],
)
def test_wrong_lists_say_which_field(change, message):
    fields = {'box': [[0, 0, 5, 5]], 'flip': [True], 'size': [[8, 8]]}
    with pytest.raises(ValueError, match=message):
        ViewGeometry.from_lists(**{**fields, 'source': [[9, 9]], **change})


def test_stack_refuses_different_numbers_of_views():
    views = ViewGeometry.from_lists(
        [[0, 0, 5, 5]] * 3, [True] * 3, [[8, 8]] * 3, [[9, 9]] * 3
    )
    with pytest.raises(ValueError, match=r'one leading shape, got \[\(2,\), \(3,\)\]'):
        ViewGeometry.stack([views, views[:2]])
