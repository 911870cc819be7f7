"""The methods as their equations read: what our step is measured against.

Eager PyTorch, explicit softmax attention, all logits at once, loops over pairs of views
and over parameters; the views of one size share a forward, as in the authors' code. It
trains the modules of a :class:`densessl.models.SelfDistillation`, so both start alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from densessl.matching import neighbour_index
from densessl.models import Tokens
from densessl.models.backbones.openmmlab import ShiftWindowMSA, SwinBlock
from densessl.models.backbones.reference_block import ReferenceBlock
from densessl.models.backbones.window_attention import LeanShiftWindowMSA, LeanSwinBlock
from densessl.models.heads import RegionHead, SelfPatchHead
from densessl.models.mlp import LeanLayers, LeanMlp


class PlainStep:
    """One training step of a model with view, SelfPatch and region heads.

    Args:
        model: the model whose parameters are trained.
        optimizer: over its parameters.
        max_norm: bound on the norm of each parameter's gradient.
        dtype: of autocast in the forward pass; None for float32 throughout.
    """

    def __init__(
        self,
        model,
        optimizer: torch.optim.Optimizer,
        max_norm: float = 3.0,
        dtype: torch.dtype | None = None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.dtype = dtype
        self.weights: dict = {}  # last layers' of this step, by projector
        for module in model.modules():
            if hasattr(module, 'fused_attn'):
                module.fused_attn = False
            if isinstance(module, LeanMlp):  # a layer's output kept for each backward
                module.__class__ = Mlp
            elif isinstance(module, LeanLayers):
                module.__class__ = nn.Sequential
            elif isinstance(module, LeanShiftWindowMSA):
                module.__class__ = ShiftWindowMSA
            elif isinstance(module, LeanSwinBlock):  # all samples through each branch
                module.__class__ = SwinBlock
            elif isinstance(module, ReferenceBlock):
                module.__class__ = Block

    def loss(self, data: dict) -> torch.Tensor:
        """Total loss of a preprocessed batch; moves the centres."""
        model = self.model
        total = 0.0
        self.weights = {}
        crops = data['inputs']
        wanted = model._teacher_roles or set(crops)
        with torch.no_grad():
            teacher = [
                self._branch(model.teacher, crops[r]) for r in crops if r in wanted
            ]
        student = [self._branch(model, c) for c in crops.values()]
        for name, head in model.heads.items():
            own = model.projectors[name]
            other = model.teacher.projectors[name]
            if isinstance(head, SelfPatchHead):
                loss, seen = self._patch_loss(head, own, other, student, teacher)
            elif isinstance(head, RegionHead):
                views = [view for group in student for view in group]
                loss, seen = self._region_loss(
                    head, own, other, views, teacher[0], data['geometry']
                )
            else:
                loss, seen = self._view_loss(head, own, other, student, teacher)
            total = total + head.loss_weight * loss
            head.center.mul_(head.center_momentum)
            head.center.add_(seen.mean(0) * (1 - head.center_momentum))
        if model.average_losses:
            total = total / sum(head.loss_weight for head in model.heads.values())
        return total

    def step(self, data: dict) -> torch.Tensor:
        """One whole step; returns the loss."""
        data = self.model.data_preprocessor(data)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype is not None):
            loss = self.loss(data)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                factor = self.max_norm / (parameter.grad.norm() + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        with torch.no_grad():
            m = self.model.momentum
            for part in ('backbone', 'neck', 'projectors'):
                for t, s in zip(
                    getattr(self.model.teacher, part).parameters(),
                    getattr(self.model, part).parameters(),
                    strict=True,
                ):
                    t.mul_(m).add_((1 - m) * s)
        return loss.detach()

    def _project(self, projector, x: torch.Tensor) -> torch.Tensor:
        """Logits of ``(..., D)`` by the weight ``g v / |v|``, made once a step."""
        if projector not in self.weights:
            last = projector.last_layer
            unit = last.weight_v / last.weight_v.norm(dim=1, keepdim=True)
            self.weights[projector] = last.weight_g * unit
        z = F.normalize(projector.mlp(x), dim=-1)
        return F.linear(z, self.weights[projector])

    @staticmethod
    def _branch(branch, views: torch.Tensor):
        """Per view: representation ``(B, D)`` and tokens, for the views of one size."""
        tokens = branch.backbone(views.flatten(0, 1))
        pooled = branch.neck.pool(tokens)
        shape = views.shape[:2]
        return list(
            zip(
                pooled.unflatten(0, shape).unbind(0),
                tokens.patches.unflatten(0, shape).unbind(0),
                [tokens.grid] * shape[0],
                strict=True,
            )
        )

    def _view_loss(self, head, own, other, student, teacher):
        student = [view for group in student for view in group]
        teacher = [view for group in teacher for view in group]
        pooled = torch.cat([pooled for pooled, *_ in student])
        z_s = self._project(own, pooled).chunk(len(student))
        with torch.no_grad():
            z_t = self._project(other, torch.cat([pooled for pooled, *_ in teacher]))
            centered = (z_t - head.center) / head.teacher_temp
            p_t = centered.softmax(-1).chunk(len(teacher))[:2]
        total, pairs = 0.0, 0
        for i, p in enumerate(p_t):
            for v, z in enumerate(z_s):
                if v != i:
                    log_p = F.log_softmax(z / head.student_temp, -1)
                    total = total + (-p * log_p).sum(-1).mean()
                    pairs += 1
        return total / pairs, z_t

    def _region_loss(self, head, own, other, student, teacher, geometry):
        """Every pair of views apart: all logits, and a teacher copy a match."""
        normalize = self.model.neck.normalize
        z_s = [
            self._project(own, normalize(f_s)) / head.student_temp
            for _, f_s, _ in student
        ]
        total, pairs, seen = 0.0, 0, []
        for i, (_, f_t, grid_t) in enumerate(teacher):
            with torch.no_grad():
                z_t = self._project(other, normalize(f_t))
                p_t = ((z_t - head.center) / head.teacher_temp).softmax(-1)
                seen.append(z_t.flatten(0, 1))
            for v, (_, f_s, grid_s) in enumerate(student):
                if v == i:
                    continue
                if head.matcher.needs_geometry:
                    index, valid = self._nearest(
                        head, geometry[:, v], grid_s, geometry[:, i], grid_t
                    )
                else:
                    cosine = F.normalize(f_s, dim=-1) @ F.normalize(f_t, dim=-1).mT
                    index = cosine.argmax(-1)
                    valid = torch.ones_like(index, dtype=torch.bool)
                target = p_t.gather(1, index[..., None].expand(-1, -1, p_t.shape[-1]))
                log_p = F.log_softmax(z_s[v], -1)
                cross_entropy = (-target * log_p).sum(-1)  # (B, N)
                total = total + (cross_entropy * valid).mean()
                pairs += 1
        return total / pairs, torch.cat(seen)

    @staticmethod
    def _nearest(head, ours, grid_s, theirs, grid_t):
        """Token of the teacher's view nearest in the source image, all against all."""
        distance = torch.cdist(
            ours.token_centers(grid_s), theirs.token_centers(grid_t), p=2
        )
        nearest, index = distance.min(-1)
        limit = head.matcher.threshold * torch.maximum(
            ours.token_diagonal(grid_s), theirs.token_diagonal(grid_t)
        )
        return index, nearest < limit[:, None]

    def _patch_loss(self, head, own, other, student, teacher):
        total, views, seen = 0.0, 0, []
        for group_s, group_t in zip(student, teacher, strict=True):
            for (_, f_s, grid), (_, f_t, _) in zip(group_s, group_t, strict=True):
                with torch.no_grad():
                    z_t = self._project(other, self._summaries(head, f_t, grid))
                    p_t = ((z_t - head.center) / head.teacher_temp).softmax(-1)
                    seen.append(z_t.flatten(0, 1))
                z_s = self._project(own, self.model.neck.normalize(f_s))
                log_p = F.log_softmax(z_s / head.student_temp, -1)
                total = total + (-p_t * log_p).sum(-1).mean()
                views += 1
        return total / views, torch.cat(seen)

    def _summaries(self, head, patches, grid):
        """``y^(i)`` of each patch: the aggregator run on its positives, set by set."""
        options = head.positives
        index, valid = neighbour_index(
            grid, options.window, options.border, patches.device
        )
        unit = F.normalize(patches, dim=-1)
        similarity = unit @ unit.mT  # (B, N, N)
        near = similarity.gather(2, index.expand(len(patches), -1, -1))
        near = near.masked_fill(~valid, -2)
        best = index.expand_as(near).gather(2, near.topk(options.top_k, -1).indices)
        chosen = patches[torch.arange(len(patches))[:, None, None], best]  # B, N, k, D
        y = self.model.teacher.neck.pool(
            Tokens(chosen.flatten(0, 1), (1, options.top_k))
        )
        return y.unflatten(0, best.shape[:2])
