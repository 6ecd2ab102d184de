"""From images to batches on the device: shards, the order of samples, augmentation parameters, the DALI pipeline.

`philox`, `order` and `augment` are pure functions; this room knows nothing of models or Ray.
"""
