"""DINO (arXiv:2104.14294) continued on own pictures from its public ViT-S/16.

20 epochs of 10,000 pictures, batches of 64. With ``--init-from`` a file that has projectors and
centre, ``model.freeze_backbone_epochs=0``. Not yet run here at this size.
"""

_base_ = [
    '../../_base_/continue.py',
    '../../_base_/data/own_dino.py',
    '../../_base_/models/dino_vit.py',
]
model = dict(teacher_momentum=0.999, freeze_backbone_epochs=2)
