"""Where each view comes from: places of tokens and points in the source image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ViewGeometry:
    """Views of source images: crop ``box``, then resize to ``size``, then ``flip``.

    Every field shares the leading shape ``...``: ``(V,)`` for the views of one sample,
    ``(B, V)`` for a batch. Methods that take a second geometry, or points, broadcast
    the leading shapes: ``geometry[:, :1].overlap(geometry[:, 1:])`` compares a batch's
    first views with all others.

    Source coordinates are pixels ``(x, y)`` with x to the right and y down; pixel i
    covers ``[i, i + 1)``. View coordinates are fractions ``(x, y)`` in ``[0, 1]`` of
    the view as seen, after the flip. A patch grid ``(h, w)`` divides the whole view
    into equal cells, numbered in raster order.

    Attributes:
        box: ``(..., 4)`` float, ``(x, y, width, height)`` of the crop in source px.
        flip: ``(...)`` bool, whether the view is mirrored left to right.
        size: ``(..., 2)`` output ``(H, W)`` in px.
        source: ``(..., 2)`` source image ``(H, W)`` in px.

    Raises:
        ValueError: the fields' shapes disagree, or a dtype is wrong.
    """

    box: Tensor
    flip: Tensor
    size: Tensor
    source: Tensor

    def __post_init__(self) -> None:
        for name, length in (('box', 4), ('size', 2), ('source', 2)):
            found, needed = tuple(getattr(self, name).shape), (*self.flip.shape, length)
            if found != needed:
                raise ValueError(f'ViewGeometry: {name} is {found}, not {needed}')
        if not self.box.is_floating_point() or self.flip.dtype != torch.bool:
            raise ValueError(
                'ViewGeometry: box must be float and flip bool, '
                f'got {self.box.dtype} and {self.flip.dtype}'
            )

    @classmethod
    def from_lists(
        cls,
        box: Sequence[Any],
        flip: Sequence[Any],
        size: Sequence[Any],
        source: Sequence[Any],
    ) -> ViewGeometry:
        """Build from (nested) lists or arrays, as float64 boxes and int64 sizes.

        Args:
            box: one ``(x, y, width, height)`` per view, in source px.
            flip: one bool per view.
            size: one ``(H, W)`` per view, in px.
            source: one ``(H, W)`` per view, in px.

        Raises:
            ValueError: shapes disagree, or a box has no positive width and height.
        """
        boxes = torch.as_tensor(box, dtype=torch.float64)
        if not bool((boxes[..., 2:] > 0).all()):
            raise ValueError(f'ViewGeometry: a box is empty or not a number: {box}')
        return cls(
            boxes,
            torch.as_tensor(flip, dtype=torch.bool),
            torch.as_tensor(size, dtype=torch.int64),
            torch.as_tensor(source, dtype=torch.int64),
        )

    @classmethod
    def stack(cls, geometries: Sequence[ViewGeometry]) -> ViewGeometry:
        """Join geometries of equal leading shape along a new first axis."""
        shapes = {tuple(geometry.shape) for geometry in geometries}
        if len(shapes) != 1:
            raise ValueError(
                f'ViewGeometry.stack: needs one leading shape, got {sorted(shapes)}'
            )
        return cls(
            torch.stack([geometry.box for geometry in geometries]),
            torch.stack([geometry.flip for geometry in geometries]),
            torch.stack([geometry.size for geometry in geometries]),
            torch.stack([geometry.source for geometry in geometries]),
        )

    @property
    def shape(self) -> torch.Size:
        """The leading shape: ``(V,)``, ``(B, V)``, ..."""
        return self.flip.shape

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, index: Any) -> ViewGeometry:
        """Index the leading axes, as a tensor of shape ``self.shape`` would be."""
        flip = self.flip[index]
        index = (*(index if isinstance(index, tuple) else (index,)), slice(None))
        return ViewGeometry(self.box[index], flip, self.size[index], self.source[index])

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> ViewGeometry:
        """Move to a device; ``dtype`` is that of the boxes (float32 or float64)."""
        return ViewGeometry(
            self.box.to(device=device, dtype=dtype, non_blocking=non_blocking),
            self.flip.to(device=device, non_blocking=non_blocking),
            self.size.to(device=device, non_blocking=non_blocking),
            self.source.to(device=device, non_blocking=non_blocking),
        )

    def token_centers(self, grid: tuple[int, int]) -> Tensor:
        """Centres of the patch cells in source px.

        A flipped view has exactly the centres of the unflipped one, mirrored in their
        order: no rounding comes between the two.

        Args:
            grid: ``(h, w)`` cells of the view.

        Returns:
            ``(..., h * w, 2)`` points ``(x, y)`` in raster order of the view as seen.
        """
        h, w = grid
        column = torch.arange(w, dtype=self.box.dtype, device=self.box.device)
        row = torch.arange(h, dtype=self.box.dtype, device=self.box.device)
        column = torch.where(self.flip[..., None], w - 1 - column, column)
        # Multiplied before it is divided: exact whenever the centre can be written.
        x = self.box[..., 0:1] + (column + 0.5) * self.box[..., 2:3] / w
        y = self.box[..., 1:2] + (row + 0.5) * self.box[..., 3:4] / h
        x = x[..., None, :].expand(*self.shape, h, w)
        y = y[..., :, None].expand(*self.shape, h, w)
        return torch.stack([x, y], -1).flatten(-3, -2)

    def token_diagonal(self, grid: tuple[int, int]) -> Tensor:
        """Distance of diagonally adjacent token centres, ``(...)`` in source px.

        A token matches by place (GLSD) within half the larger of two views' diagonals.
        """
        h, w = grid
        return torch.hypot(self.box[..., 2] / w, self.box[..., 3] / h)

    def to_source(self, points: Tensor) -> Tensor:
        """Source px of points given in view coordinates.

        Args:
            points: ``(..., P, 2)`` fractions ``(x, y)`` of the view as seen.

        Returns:
            ``(..., P, 2)`` points ``(x, y)`` in source px.
        """
        fraction = self._mirrored(points)
        return self.box[..., None, :2] + fraction * self.box[..., None, 2:]

    def to_view(self, points: Tensor) -> Tensor:
        """View coordinates of source points, the inverse of `to_source`.

        Args:
            points: ``(..., P, 2)`` points ``(x, y)`` in source px.

        Returns:
            ``(..., P, 2)`` fractions ``(x, y)``; out of ``[0, 1]`` outside the view.
        """
        return self._mirrored(self._offset(points) / self.box[..., None, 2:])

    def contains(self, points: Tensor) -> Tensor:
        """Whether source points lie in the view.

        The box is half-open as pixels are: its left and top edges belong to it, its
        right and bottom edges do not.

        Args:
            points: ``(..., P, 2)`` points ``(x, y)`` in source px.

        Returns:
            ``(..., P)`` bool.
        """
        offset = self._offset(points)
        return ((offset >= 0) & (offset < self.box[..., None, 2:])).all(-1)

    def overlap(self, other: ViewGeometry) -> Tensor:
        """Intersection of two views' boxes.

        Returns:
            ``(..., 4)`` boxes ``(x, y, width, height)`` in source px; width and height
            are both 0 where the views do not meet.
        """
        start = torch.maximum(self.box[..., :2], other.box[..., :2])
        end = torch.minimum(
            self.box[..., :2] + self.box[..., 2:],
            other.box[..., :2] + other.box[..., 2:],
        )
        extent = end - start
        meets = (extent > 0).all(-1, keepdim=True)
        return torch.cat([start, torch.where(meets, extent, 0.0)], -1)

    def overlap_area(self, other: ViewGeometry) -> Tensor:
        """Area of the intersection with another view, ``(...)`` in source px²."""
        return self.overlap(other)[..., 2:].prod(-1)

    def greatest_overlap_patch(
        self,
        reference: ViewGeometry,
        grid: tuple[int, int],
        reference_grid: tuple[int, int],
    ) -> Tensor:
        """The reference patch that each patch of this (query) view overlaps most.

        LOCA's h(j). For grids that are parallel to the axes it is the reference cell
        that holds the query patch's centre; a centre on the border of two cells, which
        it overlaps equally, takes the right or lower one in the source.

        Args:
            reference: the reference view or views.
            grid: ``(h, w)`` patches of this view.
            reference_grid: ``(h, w)`` patches of the reference.

        Returns:
            ``(..., N)`` long, N patches of this view: the raster index of the reference
            patch, or -1 where the query patch's centre is outside the reference.
        """
        h, w = reference_grid
        centers = self.token_centers(grid)
        x, y = reference._offset(centers).unbind(-1)
        width, height = reference.box[..., None, 2], reference.box[..., None, 3]
        # Clamped, as a centre next to the far edge may round up past the last cell.
        column = (x * w / width).floor().long().clamp(0, w - 1)
        row = (y * h / height).floor().long().clamp(0, h - 1)
        column = torch.where(reference.flip[..., None], w - 1 - column, column)
        return torch.where(reference.contains(centers), row * w + column, -1)

    def _offset(self, points: Tensor) -> Tensor:
        """Source points relative to the box's upper left corner, in source px."""
        return points - self.box[..., None, :2]

    def _mirrored(self, fraction: Tensor) -> Tensor:
        """Fractions ``(..., P, 2)`` with x turned round where the view is flipped."""
        x, y = fraction.unbind(-1)
        x, y = torch.broadcast_tensors(torch.where(self.flip[..., None], 1 - x, x), y)
        return torch.stack([x, y], -1)
