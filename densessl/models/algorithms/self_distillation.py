"""The one algorithm: a student, its moving average as teacher, a list of heads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from mmengine import dist
from mmengine.model import BaseModel
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.features import ViewFeatures
from densessl.models.heads.base import Head
from densessl.models.patch_drop import PatchDrop
from densessl.registry import MODELS, TASK_UTILS
from densessl.schedules import Progress, cosine

from . import checks
from .compiling import compile_blocks
from .encoding import Branch, encode_views, patch_roles, union, view_places
from .low_memory import recomputed


@MODELS.register_module()
class SelfDistillation(BaseModel):
    """A student learns from its own moving average through any list of heads.

    A step: features of student and teacher, the heads' losses, backward, optimiser
    step, ``end_step`` of the heads, then the teacher, ``t <- m t + (1 - m) s`` with
    ``m`` on a cosine from ``teacher_momentum`` to 1 (DINO, arXiv:2104.14294, Sec. 3.1).

    The student's parts are ``backbone``, ``neck`` and ``projectors``; the teacher's the
    same under ``teacher``. A head whose weight is 0 in a step rests: views, points and
    random numbers are those of a model without it, its centre, and its weights on both
    sides, stay as they are.

    Args:
        backbone: config of a backbone.
        neck: config of a neck; it is given the backbone's ``embed_dims``.
        heads: configs by name; each is given ``embed_dims``. Losses are logged as
            ``loss_<name>``. A head that is None or not ``enabled`` is left out.
        teacher_momentum: share of the old teacher that stays in step 0, as the papers
            count it (0.996); MMEngine's EMA momentum is 1 minus this.
        freeze_backbone_epochs: epochs in which the backbone's weights stay as they
            are, on both sides, while neck, projectors and heads learn: for heads that
            start anew on a trained backbone.
        average_losses: divide the weighted sum of the heads' losses by the sum of their
            current weights, as EsViT and GLSD do, so that one head more or less does
            not change the scale.
        accumulate: parts a batch is split into; each goes forward and backward on its
            own, and one step follows. Results equal those of the whole batch, but for
            what is drawn or taken over a batch: batch norm, patch dropping, negatives
            of :class:`densessl.models.heads.ContrastiveSelfPatchHead`, and the targets
            and mean predictions of :class:`densessl.models.heads.ClusterHead`.
        drop: by role, configs of :class:`densessl.models.PatchDrop`: patches that the
            student does without; None for none.
        no_positions: roles whose views the student sees without position embeddings;
            where these are all, the embeddings stay as they were drawn.
        low_memory: whether the student's activations are computed twice instead of
            kept, see :func:`densessl.models.algorithms.low_memory.recompute`.
        compile: whether ``torch.compile`` makes the blocks of a vision transformer, on
            both sides and in training mode alone.
        data_preprocessor: config of the preprocessor.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        heads: dict[str, dict | None],
        *,
        teacher_momentum: float = 0.996,
        freeze_backbone_epochs: float = 0,
        average_losses: bool = False,
        accumulate: int = 1,
        drop: dict[str, dict | None] | None = None,
        no_positions: Sequence[str] = (),
        low_memory: bool = False,
        compile: bool = False,
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
        self.freeze_backbone_epochs = freeze_backbone_epochs
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
        checks.check_weights(self.heads)
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
        self.drop: dict[str, PatchDrop] = {
            role: TASK_UTILS.build(cfg)
            for role, cfg in (drop or {}).items()
            if cfg is not None
        }
        self.no_positions = tuple(no_positions)
        self.low_memory = low_memory
        if compile:
            compile_blocks(self.backbone, self.teacher.backbone)
        checks.check_neck(self.neck, self.heads)
        checks.check_points(self.backbone, self.heads)
        checks.check_drop(self.backbone, self.heads, self.drop, self.no_positions)
        seen = union(head.student_roles for head in self.heads.values())
        if self.no_positions and seen == set(self.no_positions):
            self.backbone.pos_embed.requires_grad_(False)  # DDP waits for gradients

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
        if mode == 'tensor':
            with torch.no_grad():
                return self._features(self.teacher, inputs, None)
        named = (*self.drop, *self.no_positions)
        checks.check_views(self.heads, named, inputs, geometry)
        heads, points = self.active_heads, ({}, {})
        for head in heads.values():
            if head.needs_points:
                points = head.place_points(geometry, view_places(inputs))
        with torch.no_grad():
            teacher = self._features(
                self.teacher, inputs, self._teacher_roles, points[1], heads
            )
        student = self._features(self, inputs, self._student_roles, points[0], heads)
        log, total = {}, 0.0
        self.monitored = {}
        for name, head in heads.items():
            terms = head.loss(student, teacher, geometry, name)
            total = total + head.loss_weight * terms['loss']
            log[f'loss_{name}'] = terms.pop('loss').detach()
            log.update({f'{name}/{key}': value for key, value in terms.items()})
            self.monitored[name] = head.monitored_features(teacher)
        if self.average_losses:
            total = total / sum(head.loss_weight for head in heads.values())
        for name, head in self.heads.items():
            if head.weight.moves:
                log[f'{name}/weight'] = total.new_full((), head.loss_weight)
        if self._waits_for_all:
            trained = (p for p in self.parameters() if p.requires_grad)
            total = total + 0 * sum(p.flatten()[0] for p in trained)
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
            Scalars for the log on the CPU, averaged over the parts of the batch.

        Raises:
            NonFiniteLossError: a term is NaN or infinite; no weight has changed.
        """
        forward = forward or self
        checks.check_frozen(self.freeze_backbone_epochs, self.progress)
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
                values = _on_cpu(terms)
                checks.check_finite(values)
                optim_wrapper.backward(terms['loss'] / len(parts))
            for key, value in values.items():
                log[key] = log.get(key, 0) + value / len(parts)
        self._drop_frozen_gradients()
        if self._waits_for_all:
            self._drop_zero_gradients()
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        for head in self.active_heads.values():
            head.end_step()
        self.update_teacher()
        return log

    @property
    def active_heads(self) -> dict[str, Head]:
        """Heads whose weight is not 0 in this step; the others rest."""
        return {name: head for name, head in self.heads.items() if head.loss_weight}

    @property
    def _teacher_roles(self) -> set[str] | None:
        return union(head.teacher_roles for head in self.active_heads.values())

    @property
    def _student_roles(self) -> set[str] | None:
        return union(head.student_roles for head in self.active_heads.values())

    @property
    def momentum(self) -> float:
        """Share of the old teacher that stays in this step."""
        return cosine(
            self.teacher_momentum, 1.0, self.progress.step, self.progress.total_steps
        )

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher's parameters towards the student's."""
        if pairs := list(self._parameter_pairs()):
            teacher, student = map(list, zip(*pairs, strict=True))
            torch._foreach_lerp_(teacher, student, 1 - self.momentum)

    @property
    def _frozen(self) -> bool:
        """Whether the backbone stays as it is in this step, on both sides."""
        done = self.progress.step / self.progress.steps_per_epoch
        return done < self.freeze_backbone_epochs

    def _parameter_pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        parts = ['neck', 'projectors'] + ['backbone'] * (not self._frozen)
        for part in parts:
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
        readers: dict[str, Head] | None = None,
    ) -> ViewFeatures:
        """Features of a branch; with ``readers`` of what these heads read alone."""
        student, options = branch is self, {}
        if readers is not None:
            options['patches'] = patch_roles(branch, readers, student)
        for name, head in self.active_heads.items():
            if head.needs_points:
                options['reference_tokens'] = partial(
                    head.reference_tokens, branch.backbone, branch.projectors[name]
                )
        low_memory = student and self.low_memory
        with recomputed(self.backbone, self.neck) if low_memory else nullcontext():
            return encode_views(
                branch,
                inputs,
                roles,
                drop=self.drop if student else None,
                no_positions=self.no_positions if student else (),
                points=points,
                **options,
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

    @property
    def _waits_for_all(self) -> bool:
        """Whether parameters get a gradient of 0 because heads rest: DDP wants one."""
        return len(self.active_heads) < len(self.heads) and dist.is_distributed()

    def _drop_zero_gradients(self) -> None:
        """None where a gradient is 0 throughout, as it is without DDP.

        With 0, weight decay would move what nothing trains, and the optimiser count
        the step.
        """
        trained = [p for p in self.parameters() if p.grad is not None]
        most = torch._foreach_norm([p.grad for p in trained], float('inf'))
        for parameter, value in zip(trained, torch.stack(most).tolist(), strict=True):
            if value == 0:
                parameter.grad = None

    def _drop_frozen_gradients(self) -> None:
        epochs = self.progress.step / self.progress.steps_per_epoch
        if self._frozen:
            self.backbone.zero_grad()
        for name, head in self.heads.items():
            last_layer = getattr(self.projectors[name], 'last_layer', None)
            if last_layer is not None and epochs < head.freeze_last_layer_epochs:
                last_layer.zero_grad()


def _on_cpu(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars without their graph; from a GPU in one transfer.

    A GPU is waited for once for all, where a loss has to be looked at anyway, and not
    again for each one that is logged.
    """
    values = [value.detach() for value in terms.values()]
    device = terms['loss'].device
    if device.type != 'cpu':
        values = torch.stack([v.to(device, torch.float32) for v in values]).cpu()
    return dict(zip(terms, values, strict=True))
