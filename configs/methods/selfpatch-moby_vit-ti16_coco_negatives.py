"""SelfPatch on MoBY with negatives, ViT-Ti/16, COCO train2017. Not yet run here."""

_base_ = ['selfpatch-moby_vit-ti16_coco.py']
model = dict(heads=dict(selfpatch=dict(negatives=True)))
