"""DINO on the views of densedino_vit-ti16_2x224: the baseline of DenseDINO. Not yet run here."""

_base_ = ['densedino_vit-ti16_2x224.py']
model = dict(
    heads=dict(
        _delete_=True,
        view=dict(
            type='ViewHead',
            out_dims=65536,
            teacher_temp=0.04,
            projector=dict(norm_last_layer=True),
        ),
    )
)
