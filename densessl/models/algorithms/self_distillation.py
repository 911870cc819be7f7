"""The one algorithm: a student, its moving average as teacher, a list of heads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.backbones.vision_transformer import VisionTransformer
from densessl.models.features import Tokens, ViewFeatures
from densessl.models.patch_drop import PatchDrop, gather_tokens
from densessl.registry import MODELS, TASK_UTILS
from densessl.schedules import Progress, cosine


class NonFiniteLossError(DenseSSLError):
    """A loss term is NaN or infinite; raised before any weight has changed."""


class Branch(nn.Module):
    """Backbone, neck and projectors: the part that student and teacher both have."""

    def __init__(self, backbone: nn.Module, neck: nn.Module, projectors: nn.ModuleDict):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.projectors = projectors


@MODELS.register_module()
class SelfDistillation(BaseModel):
    """A student learns from its own moving average through any list of heads.

    A step: features of student and teacher, the heads' losses, backward, optimiser
    step, ``end_step`` of the heads, then the teacher, ``t <- m t + (1 - m) s`` with
    ``m`` on a cosine from ``teacher_momentum`` to 1 (DINO, arXiv:2104.14294, Sec. 3.1).

    The student's parts are ``backbone``, ``neck`` and ``projectors``; the teacher's the
    same under ``teacher``.

    Args:
        backbone: config of a backbone.
        neck: config of a neck; it is given the backbone's ``embed_dims``.
        heads: configs by name; each is given ``embed_dims``. Losses are logged as
            ``loss_<name>``. A head that is None or not ``enabled`` is left out.
        teacher_momentum: share of the old teacher that stays in step 0, as the papers
            count it (0.996); MMEngine's EMA momentum is 1 minus this.
        average_losses: divide the weighted sum of the heads' losses by the sum of their
            weights, as EsViT and GLSD do, so that one head more or less does not change
            the scale.
        accumulate: parts a batch is split into; each goes forward and backward on its
            own, and one step follows. Results equal those of the whole batch, but for
            what is drawn or taken over a batch: batch norm, patch dropping, and the
            targets and mean predictions of :class:`densessl.models.heads.ClusterHead`.
        drop: by role, configs of :class:`densessl.models.PatchDrop`: patches that the
            student does without; None for none.
        no_positions: roles whose views the student sees without position embeddings;
            where these are all, the embeddings stay as they were drawn.
        data_preprocessor: config of the preprocessor.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        heads: dict[str, dict | None],
        *,
        teacher_momentum: float = 0.996,
        average_losses: bool = False,
        accumulate: int = 1,
        drop: dict[str, dict | None] | None = None,
        no_positions: Sequence[str] = (),
        data_preprocessor: dict | None = None,
    ) -> None:
        preprocessor = data_preprocessor or dict(type='ViewPreprocessor')
        super().__init__(MODELS.build(preprocessor))
        if not 0.5 <= teacher_momentum <= 1:
            raise DenseSSLError(
                f'SelfDistillation: teacher_momentum={teacher_momentum} is the share '
                'of the old teacher that stays; the papers use 0.99 to 0.9995 (for '
                "MMEngine's convention give 1 minus your value)"
            )
        if accumulate < 1:
            raise DenseSSLError(
                f'SelfDistillation: accumulate={accumulate}; give the number of parts '
                'a batch is split into, 1 or more'
            )
        self.teacher_momentum = teacher_momentum
        self.average_losses = average_losses
        self.accumulate = accumulate
        self.progress = Progress(0, 1, 1)
        self.monitored: dict[str, Tensor] = {}

        self.backbone = MODELS.build(backbone)
        width = dict(embed_dims=self.backbone.embed_dims)
        self.neck = MODELS.build(neck, default_args=width)
        built = {
            name: MODELS.build(cfg, default_args=width)
            for name, cfg in heads.items()
            if cfg is not None
        }
        self.heads = nn.ModuleDict(
            {n: head for n, head in built.items() if head.enabled}
        )
        if not self.heads:
            raise DenseSSLError('SelfDistillation: no heads; name at least one')
        self.projectors = nn.ModuleDict(
            {name: head.build_projector() for name, head in self.heads.items()}
        )
        self.teacher = Branch(
            *(copy.deepcopy(m) for m in (self.backbone, self.neck, self.projectors))
        )
        self.teacher.requires_grad_(False)
        for module in self.teacher.modules():  # a deterministic teacher, as in DINO
            if hasattr(module, 'drop_prob'):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        self._teacher_roles = _union(h.teacher_roles for h in self.heads.values())
        self._student_roles = _union(h.student_roles for h in self.heads.values())
        self.drop: dict[str, PatchDrop] = {
            role: TASK_UTILS.build(cfg)
            for role, cfg in (drop or {}).items()
            if cfg is not None
        }
        self.no_positions = tuple(no_positions)
        self._check_drop()
        if self.no_positions and self._student_roles == set(self.no_positions):
            self.backbone.pos_embed.requires_grad_(False)  # DDP waits for gradients
        self._pointing = [n for n, head in self.heads.items() if head.needs_points]
        self._check_points()

    def init_weights(self) -> None:
        """Constructors draw the weights; a backbone's ``init_cfg`` may replace them."""
        if getattr(self.backbone, 'init_cfg', None):
            self.backbone.init_weights()
            self.teacher.backbone.load_state_dict(self.backbone.state_dict())

    def forward(self, inputs: dict[str, Tensor], geometry=None, mode: str = 'loss'):
        """Losses of a batch of views, or the teacher's tokens.

        Args:
            inputs: per role ``(v, B, C, H, W)``, normalised.
            geometry: ``ViewGeometry`` ``(B, V)`` or None.
            mode: ``'loss'`` for a dict of scalars with the ``'loss'`` to minimise, or
                ``'tensor'`` for the teacher's :class:`ViewFeatures` of all views.
        """
        points = ({}, {})
        if mode != 'tensor' and self._pointing:
            head = self.heads[self._pointing[0]]
            points = head.place_points(geometry, _places(inputs))
        with torch.no_grad():
            roles = None if mode == 'tensor' else self._teacher_roles
            teacher = self._features(self.teacher, inputs, roles, points[1])
        if mode == 'tensor':
            return teacher
        student = self._features(self, inputs, self._student_roles, points[0])
        log, total = {}, 0.0
        for name, head in self.heads.items():
            terms = head.loss(student, teacher, geometry, name)
            total = total + head.loss_weight * terms['loss']
            log[f'loss_{name}'] = terms.pop('loss').detach()
            log.update({f'{name}/{key}': value for key, value in terms.items()})
            self.monitored[name] = head.monitored_features(teacher)
        if self.average_losses:
            total = total / sum(head.loss_weight for head in self.heads.values())
        return {'loss': total, **log}

    def train_step(
        self, data: dict, optim_wrapper, forward: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """One optimiser step on a batch, and the teacher's update.

        Args:
            data: what the collate function gives.
            optim_wrapper: MMEngine's.
            forward: the module to call, where it is not this one (a DDP wrapper).

        Returns:
            Scalars for the log, averaged over the parts of the batch.

        Raises:
            NonFiniteLossError: a term is NaN or infinite; no weight has changed.
        """
        forward = forward or self
        for part in (self.backbone, self.teacher.backbone, *self.heads.values()):
            if hasattr(part, 'start_step'):
                part.start_step(self.progress)
        data = self.data_preprocessor(data, True)
        parts = list(self._split(data))
        log: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            no_sync = (
                nullcontext() if last else getattr(forward, 'no_sync', nullcontext)()
            )
            with no_sync:
                with optim_wrapper.optim_context(self):
                    terms = forward(**part, mode='loss')
                _check_finite(terms)
                optim_wrapper.backward(terms['loss'] / len(parts))
            for key, value in terms.items():
                log[key] = log.get(key, 0) + value.detach() / len(parts)
        self._freeze_last_layers()
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        for head in self.heads.values():
            head.end_step()
        self.update_teacher()
        return log

    @property
    def momentum(self) -> float:
        """Share of the old teacher that stays in this step."""
        return cosine(
            self.teacher_momentum, 1.0, self.progress.step, self.progress.total_steps
        )

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher's parameters towards the student's."""
        pairs = list(self._parameter_pairs())
        teacher, student = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(teacher, student, 1 - self.momentum)

    def _parameter_pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        for part in ('backbone', 'neck', 'projectors'):
            yield from zip(
                getattr(self.teacher, part).parameters(),
                getattr(self, part).parameters(),
                strict=True,
            )

    def _features(
        self,
        branch: nn.Module,
        inputs: dict[str, Tensor],
        roles: set[str] | None,
        points: dict[str, Tensor] | None = None,
    ) -> ViewFeatures:
        """Features of one branch; roles that are treated alike share a forward."""
        points = points or {}
        drop = self.drop if branch is self else {}
        bare = self.no_positions if branch is self else ()
        named = {*(roles or ()), *drop, *bare}
        if not named <= inputs.keys():
            raise DenseSSLError(
                'SelfDistillation: heads, drop or no_positions name '
                f'{", ".join(sorted(named - inputs.keys()))}, but the views are '
                f'{", ".join(inputs)}; name roles of the recipe of views'
            )
        wanted = [role for role in inputs if roles is None or role in roles]
        alike: dict[tuple, list[str]] = {}
        for role in wanted:
            count = points[role].shape[2] if role in points else 0
            key = (
                *inputs[role].shape[2:],
                role in bare,
                role if role in drop else '',
                count,
            )
            alike.setdefault(key, []).append(role)
        tokens, grids, pooled, kept, references = {}, {}, {}, {}, {}
        for group in alike.values():
            counts = [len(inputs[role]) for role in group]
            images = inputs[group[0]]
            if len(group) > 1:
                images = torch.cat([inputs[role] for role in group])
            shape = images.shape[:2]
            options = dict(positions=False) if group[0] in bare else {}
            if group[0] in points:
                places = torch.cat([points[role] for role in group])
                options['references'] = self._reference_tokens(branch, places, images)
            out, index = _encode(
                branch.backbone, images.flatten(0, 1), drop.get(group[0]), options
            )
            if out.references is not None:
                parts = out.references.unflatten(0, shape).split(counts)
                references.update(zip(group, parts, strict=True))
            if index is not None:
                kept[group[0]] = index.unflatten(0, shape)
            parts = zip(
                group,
                out.patches.unflatten(0, shape).split(counts),
                branch.neck.pool(out).unflatten(0, shape).split(counts),
                strict=True,
            )
            for role, patches, representation in parts:
                tokens[role], grids[role] = patches, out.grid
                pooled[role] = representation
        return ViewFeatures(
            pooled=torch.cat([pooled[role] for role in wanted]),
            tokens={role: tokens[role] for role in wanted},
            grids=grids,
            neck=branch.neck,
            projectors=branch.projectors,
            kept=kept,
            references=references,
            places=_places(inputs),
        )

    def _reference_tokens(
        self, branch: nn.Module, points: Tensor, images: Tensor
    ) -> Tensor:
        """``(v * B, m, D)`` for points ``(v, B, m, 2)`` of a branch's views."""
        (name,) = self._pointing
        grid = tuple(side // branch.backbone.patch_size for side in images.shape[-2:])
        return self.heads[name].reference_tokens(
            branch.backbone, branch.projectors[name], points.flatten(0, 1), grid
        )

    def _check_points(self) -> None:
        if len(self._pointing) > 1:
            raise DenseSSLError(
                f'SelfDistillation: heads {" and ".join(self._pointing)} both ask for '
                'reference tokens; leave one of them'
            )
        if self._pointing and not isinstance(self.backbone, VisionTransformer):
            raise DenseSSLError(
                f'SelfDistillation: head {self._pointing[0]!r} uses reference tokens, '
                'which need a ViT, and the backbone is '
                f'{type(self.backbone).__name__}; use VisionTransformer'
            )

    def _check_drop(self) -> None:
        """Heads and backbone can do without what ``drop`` and ``no_positions`` take."""
        vit = isinstance(self.backbone, VisionTransformer)
        before = [r for r, drop in self.drop.items() if not drop.after_encoder]
        if not vit and (before or self.no_positions):
            raise DenseSSLError(
                'SelfDistillation: drop before the encoder and no_positions need a '
                f'VisionTransformer, the backbone is {type(self.backbone).__name__}; '
                'set after_encoder=True, or leave them out'
            )
        for name, head in self.heads.items():
            seen = self.drop if head.student_roles is None else head.student_roles
            lost = [role for role in seen if role in self.drop]
            if head.whole_views and lost:
                raise DenseSSLError(
                    f'SelfDistillation: head {name!r} needs every patch of its views, '
                    f'and drop takes some of {", ".join(lost)}; leave one of them out'
                )

    def _split(self, data: dict) -> Iterable[dict]:
        if self.accumulate == 1:
            yield data
            return
        batch = next(iter(data['inputs'].values())).shape[1]
        if batch % self.accumulate:
            raise DenseSSLError(
                f'SelfDistillation: a batch of {batch} images does not split into '
                f'accumulate={self.accumulate} equal parts; choose a divisor'
            )
        size = batch // self.accumulate
        for start in range(0, batch, size):
            part = slice(start, start + size)
            geometry = data['geometry']
            yield dict(
                inputs={role: x[:, part] for role, x in data['inputs'].items()},
                geometry=None if geometry is None else geometry[part],
            )

    def _freeze_last_layers(self) -> None:
        epochs = self.progress.step / self.progress.steps_per_epoch
        for name, head in self.heads.items():
            last_layer = getattr(self.projectors[name], 'last_layer', None)
            if last_layer is not None and epochs < head.freeze_last_layer_epochs:
                for parameter in last_layer.parameters():
                    parameter.grad = None


def _union(roles: Iterable[tuple[str, ...] | None]) -> set[str] | None:
    """Roles that any head asks for; None, for all, where one asks for all."""
    roles = list(roles)
    return None if None in roles else {role for some in roles for role in some}


def _places(inputs: dict[str, Tensor]) -> dict[str, slice]:
    places, start = {}, 0
    for role, views in inputs.items():
        places[role] = slice(start, start + len(views))
        start += len(views)
    return places


def _encode(
    backbone: nn.Module, images: Tensor, drop: PatchDrop | None, options: dict
) -> tuple[Tokens, Tensor | None]:
    """Tokens of ``(B, C, H, W)``; with ``drop``, of some patches and which ones."""
    if drop is None:
        return backbone(images, **options), None
    if drop.after_encoder:
        out = backbone(images, **options)
        index = drop(out.grid, len(images), images.device)
        return replace(out, patches=gather_tokens(out.patches, index)), index
    grid = tuple(side // backbone.patch_size for side in images.shape[-2:])
    index = drop(grid, len(images), images.device)
    return backbone(images, keep=index, **options), index


def _check_finite(terms: dict[str, Tensor]) -> None:
    if terms['loss'].isfinite():
        return
    bad = [
        key for key, value in terms.items() if key != 'loss' and not value.isfinite()
    ]
    raise NonFiniteLossError(
        f'the loss is not finite: the first such term is {(bad or ["loss"])[0]}; lower '
        'the learning rate, lengthen its warm-up, or train with precision=bf16 or fp32'
    )
