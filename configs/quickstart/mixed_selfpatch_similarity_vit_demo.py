"""SelfPatch and regions matched by similarity, on built-in scenes, on a CPU."""

_base_ = ['mixed_selfpatch_geometric_vit_demo.py']
model = dict(heads=dict(region=dict(matching='similarity')))
