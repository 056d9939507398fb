"""Which kernels compute experts on a CUDA device: candidates of all kinds, a model of their cost, and measured choices.

`candidate` lists what may compute a block, `device` says what a device can do, `cost` is the model, `choose` takes the
cheapest, and `tune` measures candidates once and keeps the results for each device.
"""
