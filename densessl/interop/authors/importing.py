"""Authors' checkpoints in: one function for all layouts, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densessl.errors import DenseSSLError
from densessl.interop.backbone import branch, save_weights
from densessl.registry import MODELS

from . import dino, loca, moby, plain
from .architecture import backbone_config, kind_of
from .guess import guess
from .layout import MEAN, STD, Layout, State, Traits
from .reading import flatten, read_checkpoint
from .whole import check_whole, fill_branches

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (*dino.LAYOUTS, *moby.LAYOUTS, *loca.LAYOUTS, *plain.LAYOUTS)
}
# What is read of a file that has more than weights
_ROOTS = (
    'student',
    'teacher',
    'dino_loss',
    'model',
    'state_dict',
    'params',
    'ema_params',
)


@dataclass(frozen=True)
class Imported:
    """An authors' checkpoint in our layout.

    Attributes:
        state: the algorithm's state dict (docs/checkpoints.md), as far as the file has
            it; both backbones always.
        config: of the backbone.
        mean: per channel in 0..255, that inputs are normalised with.
        std: likewise.
        notes: lines on what was taken, what the file lacks, what was left out.
    """

    state: State
    config: dict
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]

    def save(self, path: str | Path, source: str) -> None:
        """Write the file that ``--init-from`` takes.

        Args:
            path: file to write.
            source: where the weights are from, in a line.
        """
        save_weights(
            path, self.state, self.config, mean=self.mean, std=self.std, source=source
        )


def import_checkpoint(
    path: str | Path, layout: str, *, num_heads: int | None = None
) -> Imported:
    """Read a checkpoint of a named layout; whole, or not at all.

    Args:
        path: the file.
        layout: one of ``LAYOUTS``.
        num_heads: heads of a ViT whose width does not tell them (64 channels each).

    Raises:
        DenseSSLError: unknown layout, a file that cannot be read or is of another
            layout, names that are missing or unknown, shapes that do not fit.
    """
    known = find_layout(layout)
    checkpoint = read_checkpoint(path)
    names = list(flatten(checkpoint))
    likely = guess(names)
    if layout not in likely:
        raise DenseSSLError(f'{path}: {_unlike(layout, likely, names)}')
    try:
        return _import(checkpoint, known, num_heads)
    except DenseSSLError as error:
        cause = str(error).removeprefix(f'{layout}: ')
        raise DenseSSLError(f'{path}, as {layout}: {cause}') from error


def export_checkpoint(state: State, config: dict, layout: str) -> dict[str, Any]:
    """An algorithm's state in an authors' layout, as their code writes it.

    Args:
        state: as of :class:`Imported`.
        config: of the backbone.
        layout: one of ``LAYOUTS``; those without a method take the teacher's backbone.

    Raises:
        DenseSSLError: unknown layout, or one that has no place for a part.
    """
    known = find_layout(layout)
    own = branch(state, 'teacher.backbone.')
    kind = kind_of(list(own)) or 'unknown'
    if kind == 'dinov2':
        gated = (
            own['model.blocks.0.mlp.fc1.bias'].shape[0]
            > own['model.blocks.0.mlp.fc2.weight'].shape[1]
        )
        kind = 'swiglu' if gated else 'mlp'
    heads = None
    if kind == 'vit':
        heads = MODELS.build(config).blocks[0].attn.num_heads
    try:
        table = known.table(Traits(kind, kind != 'vit' or 'cls_token' in own, heads))
    except KeyError:
        raise DenseSSLError(
            f'{layout}: this layout has no names for a {config["type"]} '
            f'({config.get("name", config.get("arch"))}); choose another'
        ) from None
    if not known.parts:
        state = {k: v for k, v in state.items() if k.startswith('teacher.backbone.')}
    return known.scatter(table.there(known.unfinish(state)))


def find_layout(name: str) -> Layout:
    """A layout by name.

    Raises:
        DenseSSLError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise DenseSSLError(
            f'unknown layout {name!r}; choose from {", ".join(sorted(LAYOUTS))}'
        )
    return LAYOUTS[name]


def _import(checkpoint: Mapping, layout: Layout, num_heads: int | None) -> Imported:
    flat = layout.gather(checkpoint)
    traits = layout.traits(flat)
    table = layout.table(traits)
    state = layout.finish(table.back(flat))
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    held = list(state)
    state, lacking = fill_branches(state)
    weights = branch(state, 'teacher.backbone.')
    config, told = backbone_config(weights, num_heads or traits.num_heads)
    kind = kind_of(list(weights)) or ''
    for option, value in layout.vit.items():
        if kind == 'vit' and config[option] != value:
            raise DenseSSLError(
                f'the ViT would have {option}={config[option]}, and those of this '
                f'layout have {value}; the file is incomplete, or of another layout'
            )
    config.update(layout.options.get(kind, {}))
    sizes = check_whole(state, config)

    notes = [f'assumed: {told}'] if told else []
    heads = traits.num_heads
    if heads and heads != max(1, len(weights['norm.weight']) // 64):
        notes.append(f'set num_heads={heads} in the position head too')
    notes += _parts_notes(layout, held, lacking, sizes)
    read = [key for key in _ROOTS if key in checkpoint]
    others = [key for key in checkpoint if read and key not in _ROOTS]
    notes += [f'left out: {", ".join(others)}'] if others else []
    left = table.left_out(list(flat))
    notes += [f'left out: {why} ({len(names)})' for why, names in left.items()]
    notes += [layout.differs[key] for key in ('', kind) if key in layout.differs]
    if layout.name in ('timm', 'mmpretrain'):
        notes.append("assumed: ImageNet's mean and std, as the file does not tell them")
    return Imported(state, config, MEAN, STD, tuple(notes))


def _parts_notes(
    layout: Layout, held: list[str], lacking: str | None, sizes: dict[str, int]
) -> list[str]:
    notes = []
    if lacking is None:
        notes.append('taken: student and teacher')
    else:
        other = 'teacher' if lacking == 'student' else 'student'
        notes.append(
            f'taken: one backbone; the {lacking} starts as a copy of the {other}'
        )
    if sizes:
        heads = ', '.join(f'{head} ({size})' for head, size in sizes.items())
        notes.append(f'taken: projectors {heads}')
    names = [name.removeprefix('teacher.') for name in held]
    there = {part: any(n.startswith(part) for n in names) for part in layout.parts}
    rest = [part.rstrip('.') for part in there if there[part]]
    rest = [part for part in rest if not part.startswith('projectors.')]
    missing = [part.rstrip('.') for part in there if not there[part]]
    notes += [f'taken: {", ".join(rest)}'] if rest else []
    notes += [f'not in the file, starts anew: {", ".join(missing)}'] if missing else []
    return notes


def _unlike(layout: str, likely: tuple[str, ...], names: list[str]) -> str:
    if not likely:
        return (
            f'names of no layout that is known ({", ".join(names[:3])}, ...); known '
            f'are {", ".join(sorted(LAYOUTS))}'
        )
    return (
        f'not of layout {layout}; it seems to be {" or ".join(likely)}, give '
        f'--from {likely[0]}'
    )
