"""About 1,000 pictures, 8 GPUs: GLSD, Swin-T/7, 15,600 steps of 8 x 16 images.

Not yet run here.
"""

_base_ = ['1k-pictures_1gpu.py']
train_dataloader = dict(batch_size=16, sampler=dict(length=20000))
