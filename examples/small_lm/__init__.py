"""A small mixture-of-experts language model, trained on the documentation of Python and four packages.

It is large enough to learn something and small enough to train on a laptop, so that what pruning does to quality can be
seen. `model.safetensors` and `tokenizer.json` are what ``python -m examples.small_lm.train`` writes with seed 0;
`sparse75.safetensors`, with 75 % of its experts' weights pruned, is what ``python -m examples.small_lm.recover`` makes.
"""
