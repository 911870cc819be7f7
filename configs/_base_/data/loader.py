"""The loader of every data set; a data set adds its folder and its views."""

train_dataloader = dict(
    num_workers=10,
    sampler=dict(type='EpochSampler'),
    batch_sampler=dict(type='GlobalBatchSampler'),
    collate_fn=dict(type='densessl.collate_views'),
    dataset=dict(type='UnlabelledImages'),
)
