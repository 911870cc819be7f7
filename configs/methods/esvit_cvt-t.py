"""EsViT, CvT-T, ImageNet-1K, 300 epochs, 8 x 64 images, batch norm over all processes.

With the relative position bias of the paper
(``model.backbone.relative_position_bias=False`` leaves it out). Not yet run here.
"""

_base_ = ['esvit_swin-t-w7.py']
model = dict(backbone=dict(_delete_=True, type='CvT', arch='tiny', drop_path_rate=0.1))
sync_bn = 'torch'
