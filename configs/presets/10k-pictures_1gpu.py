"""About 10,000 pictures, one GPU: GLSD, Swin-T/7, 31,200 steps of 128 images.

Not yet run here.
"""

_base_ = ['1k-pictures_1gpu.py']
train_dataloader = dict(batch_size=128)
_head = dict(out_dims=4096)
model = dict(heads=dict(view=_head, region=_head), teacher_momentum=0.995, accumulate=2)
train_cfg = dict(max_epochs=400)
