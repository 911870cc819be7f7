"""DINO, ViT-Ti/8, COCO train2017, 200 epochs, 8 x 32 images. Not yet run here."""

_base_ = ['dino_vit-ti16_coco.py']
model = dict(backbone=dict(patch_size=8))
