"""Which layouts a checkpoint may be of, by its names alone."""

from __future__ import annotations

from collections.abc import Iterable

_ESVIT = ('esvit', 'glsd')
# Names that one layout alone has
_SIGNS = (
    ('.ca_head.', ('selfpatch',)),
    ('.patch_pos_embed', ('densedino',)),
    ('.encoder_k.', ('moby',)),
    ('.linear_hidden.', ('moby',)),
    ('.ToTokenSequence_0', ('loca',)),
    ('.mask_token', ('dinov2',)),
    ('.register_tokens', ('dinov2',)),
    ('.ls1.gamma', ('dinov2',)),
    ('.patch_embed.projection.', ('mmpretrain',)),
    ('.head_dense.', _ESVIT),
    ('.stage0.0.proj.', _ESVIT),
)


def guess(names: Iterable[str]) -> tuple[str, ...]:
    """Layouts that the dotted names of a whole checkpoint fit; the likeliest first."""
    names = [f'.{name}' for name in names]

    def has(sign: str) -> bool:
        return any(sign in name for name in names)

    for sign, layouts in _SIGNS:
        if has(sign):
            return layouts
    branches = any(name.startswith(('.student.', '.teacher.')) for name in names)
    if has('.layers.0.blocks.0.'):
        if branches:
            return _ESVIT
        moved = has('.layers.1.downsample.') and not has('.layers.0.downsample.')
        return ('timm',) if moved else (*_ESVIT, 'moby', 'timm')
    if has('.blocks.0.attn.qkv.'):
        if not has('.cls_token'):
            normed = any(name.endswith('.norm.weight') for name in names)
            return ('timm',) if normed else ('selfpatch',)
        if not branches:
            return ('dino', 'moby', 'timm')
        return ('dino',) if has('.backbone.') else (*_ESVIT, 'dino')
    if has('.layer1.0.conv1.'):
        if branches:
            return ('dino', *_ESVIT)
        wrapped = has('.backbone.layer1.')
        return ('mmpretrain',) if wrapped else ('dino', 'mmpretrain', 'timm')
    return ()
