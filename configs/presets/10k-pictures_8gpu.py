"""About 10,000 pictures, 8 GPUs: GLSD, Swin-T/7, 31,200 steps of 8 x 64 images.

Not yet run here.
"""

_base_ = ['10k-pictures_1gpu.py']
train_dataloader = dict(batch_size=64, sampler=dict(length=40000))
model = dict(teacher_momentum=0.996, accumulate=1)
