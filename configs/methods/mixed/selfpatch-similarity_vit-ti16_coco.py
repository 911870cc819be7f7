"""SelfPatch and regions matched by similarity, ViT-Ti/16, COCO train2017, 200 epochs.

The dense task that the SelfPatch paper compares with (EsViT's), beside its own. Not yet
run here.
"""

_base_ = ['selfpatch-geometric_vit-ti16_coco.py']
model = dict(heads=dict(region=dict(matching='similarity')))
