"""Triton for CUDA GPUs: a specification in, readable text and a loaded kernel out.

`spec` says what a kernel computes, `emit` writes it from the text in ``templates/``, `build` keeps it in a file and
loads it, `kernel` launches it, `select` chooses its tile, `prove` checks it on a device before it is used there.

Importing this package does not import Triton; loading a kernel does. Under ``TRITON_INTERPRET=1`` kernels run on CPU
tensors, in Triton's interpreter.
"""
