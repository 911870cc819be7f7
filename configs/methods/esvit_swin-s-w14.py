"""EsViT, Swin-S/14, ImageNet-1K, 300 epochs, 8 x 64 images.

As the authors: the view task alone (``esvit-v_swin-s-w14.py``) for 180 to 200 epochs,
then this config with ``--resume STEP_PTH --add-heads``. Not yet run here.
"""

_base_ = ['esvit_swin-s-w7.py']
model = dict(backbone=dict(window_size=[14, 14, 14, 7]))
