"""LOCA's positions: where query patches are said to lie in a partly hidden reference.

As in the figure of LOCA (arXiv:2212.02400): one network, shown less and less.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor

from densessl.datasets import read_image
from densessl.datasets.transforms.multi_crop import MultiCrop
from densessl.engine.launch import load_config
from densessl.engine.launch import parse_args as training_args
from densessl.errors import DenseSSLError
from densessl.evaluation.loading import build_part
from densessl.geometry import ViewGeometry
from densessl.interop.backbone import load_strictly
from densessl.models import PatchDrop, SelfDistillation, Tokens
from densessl.models.heads import PositionHead
from densessl.models.patch_drop import gather_tokens
from densessl.registry import TRANSFORMS

from .matches import BETWEEN_PX, GAP_PX, Grid, place_colours, stack_titled
from .views import (
    View,
    cut_views,
    plain_recipes,
    read_weights,
    view_config,
    write_sheet,
    zoom_of,
)

HIDDEN = (200, 200, 200)
"""What hidden patches fade to."""
EDGE_PX = 2
"""Of the outline of a query, drawn inside its box."""
EDGE = (20, 20, 20)


def draw_positions(
    reference: View,
    query: View,
    grids: tuple[Grid, Grid],
    found: np.ndarray,
    valid: np.ndarray,
    visible: np.ndarray,
    *,
    zoom: int = 1,
) -> np.ndarray:
    """A reference with the predicted places of a query's patches; the query beside it.

    A query patch that counts is tinted by its colour, see `place_colours`; the patch of
    the reference where it is said to lie has a square of that colour, in stripes where
    several are said to lie. Hidden patches of the reference are greyed, and the part of
    it that the query shows is outlined.

    Args:
        reference: to the left.
        query: to the right.
        grids: ``(h, w)`` patches of each.
        found: ``(M,)`` integers, for each query patch a reference patch, raster order.
        valid: ``(M,)`` bool, which of them count.
        visible: ``(N,)`` bool, the reference patches that were seen.
        zoom: whole number; a pixel of a view becomes ``zoom`` x ``zoom`` px.

    Returns:
        Uint8 RGB on white: `GAP_PX` around the views and `BETWEEN_PX` between them.
    """
    left, right = (v.pixels.repeat(zoom, 0).repeat(zoom, 1) for v in (reference, query))
    colours = place_colours(grids[1])
    for cell in np.flatnonzero(~visible):
        patch = left[_cell(cell, grids[0], left.shape)]
        patch[:] = _faded(patch)
    for cell in np.unique(found[valid]):
        rows, columns = _cell(cell, grids[0], left.shape)
        square = left[_inset(rows), _inset(columns)]
        tokens = np.flatnonzero(valid & (found == cell))
        ends = np.linspace(0, square.shape[1], len(tokens) + 1).round().astype(int)
        for token, start, end in zip(tokens, ends[:-1], ends[1:], strict=True):
            square[:, start:end] = colours[token]
    for token in np.flatnonzero(valid):
        patch = right[_cell(token, grids[1], right.shape)]
        patch[:] = (patch.astype(int) + colours[token]) // 2
    _outline(left, query_box(reference.geometry, query.geometry, left.shape[:2]))

    start = GAP_PX + left.shape[1] + BETWEEN_PX
    height = max(len(left), len(right)) + 2 * GAP_PX
    sheet = np.full((height, start + right.shape[1] + GAP_PX, 3), 255, np.uint8)
    sheet[GAP_PX : GAP_PX + len(left), GAP_PX : start - BETWEEN_PX] = left
    sheet[GAP_PX : GAP_PX + len(right), start:-GAP_PX] = right
    return sheet


def query_box(
    reference: ViewGeometry, query: ViewGeometry, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where a query lies in a reference of ``size`` ``(H, W)`` px, as it is seen.

    Returns:
        Left, top, right and bottom in px; they may lie outside of it.
    """
    corners = torch.cat([query.box[:2], query.box[:2] + query.box[2:]]).view(2, 2)
    places = reference.to_view(corners) * corners.new_tensor(size[::-1])
    x, y = places.round().long().sort(0).values.unbind(1)
    return int(x[0]), int(y[0]), int(x[1]), int(y[1])


def draw_command(args: argparse.Namespace) -> None:
    """One PNG for each picture, a row for each masking ratio."""
    for ratio in args.ratios:
        if not 0 <= ratio <= 1:
            raise DenseSSLError(
                f'--ratios {ratio:g}: a masking ratio is the share of the reference '
                'that is hidden; give 0 to 1'
            )
    images = [read_image(path) for path in args.images]
    guide = _load(load_config(training_args([args.config])), Path(args.checkpoint))
    for ratio in args.ratios:
        guide.check(ratio)
    for i, (path, image) in enumerate(zip(args.images, images, strict=True)):
        rng = np.random.default_rng([args.seed, i])
        reference, query = guide.cut(image, rng)
        draw = int(rng.integers(2**31))
        rows = dict(guide.row(reference, query, ratio, draw) for ratio in args.ratios)
        out = Path(args.out) / f'{i:03d}_{Path(path).stem}.png'
        write_sheet(out, stack_titled(rows))
        print(out)


@dataclass(frozen=True)
class _Guide:
    """A trained network, and how its views are cut."""

    model: SelfDistillation
    head: PositionHead
    crop: MultiCrop
    query: tuple[str, int]  # role, and number among its views

    def check(self, ratio: float) -> None:
        """A head without a block has nothing to look at a reference with."""
        if self.head.block is None and self._drop(ratio).count(self.head.grid):
            raise DenseSSLError(
                f'--ratios {ratio:g}: this head was trained with mask_ratio=1 and has '
                'no block to see a reference with; give --ratios 1'
            )

    def cut(self, image: np.ndarray, rng: np.random.Generator) -> tuple[View, View]:
        """The first reference of a picture, and the first query."""
        views = cut_views(self.crop, image, rng)
        role, number = self.query
        return views[self.head.reference_role][0], views[role][number]

    @torch.no_grad()
    def row(
        self, reference: View, query: View, ratio: float, seed: int
    ) -> tuple[str, np.ndarray]:
        """Title and picture; patches of one seed are hidden at whatever ratio."""
        model, head = self.model, self.head
        index = self._visible(ratio, seed)
        queries = self._tokens(model.backbone, query, self.query[0])
        if head.encoder == 'student' and self._reference_drop():
            seen = self._tokens(model.backbone, reference, head.reference_role, index)
            references = seen.patches[None]
        else:
            encoder = model if head.encoder == 'student' else model.teacher
            role = head.reference_role if encoder is model else ''
            seen = self._tokens(encoder.backbone, reference, role)
            self._check_grid(seen.grid)
            references = gather_tokens(seen.patches, index)[None]
        logits = head.predict(queries.patches, references)[0, :, 0]
        target = query.geometry.greatest_overlap_patch(
            reference.geometry, queries.grid, head.grid
        )
        valid = target >= 0
        title = f'masking ratio {ratio:g}: the query does not meet the reference'
        if valid.any():
            score = head.scores(logits, target)
            title = (
                f'masking ratio {ratio:g}: {100 * score["accuracy"]:.0f} % of '
                f'{int(valid.sum())} patches in place, {score["distance"]:.2f} tokens '
                'off'
            )
        visible = np.isin(np.arange(logits.shape[-1]), index)
        return title, draw_positions(
            reference,
            query,
            (head.grid, queries.grid),
            logits.argmax(-1).numpy(),
            valid.numpy(),
            visible,
            zoom=zoom_of(reference),
        )

    def _reference_drop(self) -> PatchDrop | None:
        return self.model.drop.get(self.head.reference_role)

    def _drop(self, ratio: float) -> PatchDrop:
        drop = self.head.visible
        if self.head.encoder == 'student' and self._reference_drop():
            drop = self._reference_drop()
        return PatchDrop(1.0 - ratio, drop.kind)

    def _visible(self, ratio: float, seed: int) -> Tensor:
        """``(1, n)`` indices of the reference patches that are seen."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._drop(ratio)(self.head.grid, 1)

    def _tokens(
        self, backbone, view: View, role: str, keep: Tensor | None = None
    ) -> Tokens:
        """``(1, n, D)`` patches of a view, as in training."""
        pixels = torch.from_numpy(view.pixels).permute(2, 0, 1)[None, None]
        data = self.model.data_preprocessor(dict(inputs=dict(view=pixels)))
        options = {} if keep is None else dict(keep=keep)
        if role in self.model.no_positions:
            options['positions'] = False
        return backbone(data['inputs']['view'][0], **options)

    def _check_grid(self, grid: Grid) -> None:
        if tuple(grid) != self.head.grid:
            raise DenseSSLError(
                f'the references have {grid[0]} x {grid[1]} patches, the head is for '
                f'{self.head.grid[0]} x {self.head.grid[1]}; use the config of the run'
            )


def _load(cfg: Config, path: Path) -> _Guide:
    """The network of a run, with all its heads."""
    crop = view_config(cfg)
    model = build_part(cfg.model, f'config {cfg.filename}')
    heads = [(n, h) for n, h in model.heads.items() if isinstance(h, PositionHead)]
    if not heads:
        raise DenseSSLError(
            f'config {cfg.filename}: no PositionHead among its heads '
            f"({', '.join(model.heads)}); give one of LOCA's, such as "
            'configs/quickstart/loca_vit_demo.py'
        )
    name, head = heads[0]
    if head.task not in ('patch', 'center'):
        raise DenseSSLError(
            f'config {cfg.filename}: head {name!r} has task={head.task!r}, which gives '
            'no places in a reference; only patch and center do'
        )
    if path.suffix == '.safetensors' and path.is_file():
        raise DenseSSLError(
            f'checkpoint {path}: a backbone alone, without the head that predicts '
            'positions; give step_*.pth of the work dir'
        )
    weights = read_weights(path)
    if not any(key.startswith(f'heads.{name}.') for key in weights):
        raise DenseSSLError(
            f'checkpoint {path}: it has no head {name!r}; give step_*.pth of a run '
            'that trained one'
        )
    load_strictly(model, weights, f'checkpoint {path}')
    recipes = plain_recipes(crop)
    counts: dict[str, int] = {}
    for recipe in recipes:
        counts[recipe.role] = counts.get(recipe.role, 0) + recipe.count
    queries = [
        (role, i)
        for role in head.query_roles
        for i in range(counts.get(role, 0))
        if (role, i) != (head.reference_role, 0)
    ]
    if head.reference_role not in counts or not queries:
        raise DenseSSLError(
            f'config {cfg.filename}: views of roles {", ".join(counts)}, and head '
            f'{name!r} needs {head.reference_role} and one of '
            f'{", ".join(head.query_roles)}; name roles of the recipe of views'
        )
    plain = TRANSFORMS.build(dict(crop, views=recipes))
    return _Guide(model.eval(), head, plain, queries[0])


def _cell(token: int, grid: Grid, size: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of a patch in a picture of ``size`` px."""
    return tuple(
        slice(place * side // count, (place + 1) * side // count)
        for place, count, side in zip(
            divmod(int(token), grid[1]), grid, size[:2], strict=True
        )
    )


def _inset(part: slice) -> slice:
    """Without an eighth at either end."""
    margin = (part.stop - part.start) // 8
    return slice(part.start + margin, part.stop - margin)


def _faded(patch: np.ndarray) -> np.ndarray:
    """Grey, and three quarters of the way to `HIDDEN`."""
    grey = cv2.cvtColor(np.ascontiguousarray(patch), cv2.COLOR_RGB2GRAY)[..., None]
    return (0.25 * grey + 0.75 * np.array(HIDDEN)).round().astype(np.uint8)


def _outline(picture: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Edges of a box, as far as they lie in the picture."""
    left, top, right, bottom = box
    inside = np.zeros(picture.shape[:2], bool)
    for shrink in (0, EDGE_PX):
        rows = slice(max(0, top + shrink), max(0, bottom - shrink))
        columns = slice(max(0, left + shrink), max(0, right - shrink))
        inside[rows, columns] = shrink == 0
    picture[inside] = EDGE
