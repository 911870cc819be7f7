"""DINO on the views of densedino_vit-ti16_2x224: the baseline of DenseDINO. Not yet run here."""

_base_ = ['densedino_vit-ti16_2x224.py']
model = dict(heads=dict(view=dict(student_views='all', loss_weight=1.0), points=None))
