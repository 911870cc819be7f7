"""SelfPatch on MoBY with negatives, Swin-T/7, COCO train2017. Not yet run here."""

_base_ = ['selfpatch-moby_swin-t_coco.py']
model = dict(heads=dict(selfpatch=dict(negatives=True)))
