"""The one algorithm: a student, its moving average as teacher, a list of heads."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.features import ViewFeatures
from densessl.registry import MODELS
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
            ``loss_<name>``. A head that is not ``enabled`` is left out.
        teacher_momentum: share of the old teacher that stays in step 0, as the papers
            count it (0.996); MMEngine's EMA momentum is 1 minus this.
        average_losses: divide the weighted sum of the heads' losses by the sum of their
            weights, as EsViT and GLSD do, so that one head more or less does not change
            the scale.
        accumulate: parts a batch is split into; each goes forward and backward on its
            own, and one step follows. Results equal those of the whole batch.
        data_preprocessor: config of the preprocessor.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        heads: dict[str, dict],
        *,
        teacher_momentum: float = 0.996,
        average_losses: bool = False,
        accumulate: int = 1,
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
            name: MODELS.build(cfg, default_args=width) for name, cfg in heads.items()
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
        roles = [head.teacher_roles for head in self.heads.values()]
        self._teacher_roles = None if None in roles else {r for rs in roles for r in rs}

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
        with torch.no_grad():
            roles = None if mode == 'tensor' else self._teacher_roles
            teacher = self._features(self.teacher, inputs, roles)
        if mode == 'tensor':
            return teacher
        student = self._features(self, inputs, None)
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
        self, branch: nn.Module, inputs: dict[str, Tensor], roles: set[str] | None
    ) -> ViewFeatures:
        """Features of one branch; roles of equal size share a forward."""
        wanted = [role for role in inputs if roles is None or role in roles]
        by_size: dict[tuple[int, ...], list[str]] = {}
        for role in wanted:
            by_size.setdefault(tuple(inputs[role].shape[2:]), []).append(role)
        tokens, grids, pooled = {}, {}, {}
        for group in by_size.values():
            counts = [len(inputs[role]) for role in group]
            images = inputs[group[0]]
            if len(group) > 1:
                images = torch.cat([inputs[role] for role in group])
            out = branch.backbone(images.flatten(0, 1))
            shape = images.shape[:2]
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
