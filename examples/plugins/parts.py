"""A transform, a hook and a backbone of one's own."""

from mmengine.hooks import Hook
from torch import nn

from densessl.engine.distributed import unwrap
from densessl.models import Tokens
from densessl.registry import HOOKS, MODELS, TRANSFORMS


@TRANSFORMS.register_module()
class EraseBlock:
    """Greys a random block of each view of a role, ``share`` of its sides long."""

    def __init__(self, role='global', share=0.4):
        self.role, self.share = role, share

    def __call__(self, results):
        """After MultiCrop, which has put the views there."""
        views, rng = results['inputs'][self.role], results['rng']  # (v, 3, H, W) uint8
        h, w = (round(self.share * side) for side in views.shape[-2:])
        for view in views:
            top = rng.integers(view.shape[-2] - h + 1)
            left = rng.integers(view.shape[-1] - w + 1)
            view[:, top : top + h, left : left + w] = 127
        return results


@HOOKS.register_module()
class TeacherGapHook(Hook):
    """Logs how far the teacher's backbone is from the student's, in the L2 norm."""

    def __init__(self, interval=50):
        self.interval = interval

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """After the step, and the teacher's."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        model = unwrap(runner.model)
        student, teacher = (x.backbone.parameters() for x in (model, model.teacher))
        pairs = zip(student, teacher, strict=True)
        gap = sum((s - t).square().sum() for s, t in pairs).sqrt()
        runner.visualizer.add_scalars({'teacher_gap': float(gap)}, runner.iter + 1)


@MODELS.register_module()
class PatchMixer(nn.Module):
    """Patches, then depthwise convolutions: tokens for views of any size."""

    def __init__(self, embed_dims=96, depth=4, patch_size=8):
        super().__init__()
        self.embed_dims, self.patch_size = embed_dims, patch_size  # others read these
        self.stem = nn.Conv2d(3, embed_dims, patch_size, patch_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, embed_dims),
                nn.Conv2d(embed_dims, embed_dims, 5, padding=2, groups=embed_dims),
                nn.GELU(),
                nn.Conv2d(embed_dims, embed_dims, 1),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, images):
        """``(B, 3, H, W)`` to tokens in raster order."""
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return Tokens(self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[-2:]))
