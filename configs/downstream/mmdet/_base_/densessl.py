"""What densessl adds to a config of MMDetection: its parts, and the check of the weights."""

custom_imports = dict(imports=['densessl'], allow_failed_imports=False)
custom_hooks = [dict(type='densessl.WeightFingerprintHook')]
