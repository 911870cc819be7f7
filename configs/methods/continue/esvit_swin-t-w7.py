"""EsViT (arXiv:2106.09785) continued on own pictures from its public Swin-T/7.

20 epochs of 10,000 pictures, batches of 64. With ``--init-from`` a file that has projectors and
centres, ``model.freeze_backbone_epochs=0``. Not yet run here at this size.
"""

_base_ = [
    '../../_base_/continue.py',
    '../../_base_/data/own_dino.py',
    '../../_base_/models/esvit_swin.py',
]
_head = dict(teacher_temp=0.04)
model = dict(
    heads=dict(view=_head, region=_head),
    teacher_momentum=0.999,
    freeze_backbone_epochs=2,
)
