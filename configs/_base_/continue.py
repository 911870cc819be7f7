"""Going on from trained weights on pictures of one's own; see docs/continue.md.

New heads learn first, on a frozen backbone (``model.freeze_backbone_epochs`` of each
config); then all layers do, at a fifth of DINO's learning rate, and at less the nearer a
block is to the pixels. A look at the start guards against a fall.
"""

_base_ = ['runtime.py']
train_cfg = dict(max_epochs=20)
optim_wrapper = dict(optimizer=dict(lr=1e-4), layer_decay=0.75)
default_hooks = dict(
    schedule=dict(warmup_epochs=1, end_weight_decay=None),
    # built-in scenes stand in for labelled pictures of one's own
    probe=dict(segmentation='demo', interval=1, guard='warn', margin=0.01),
)
