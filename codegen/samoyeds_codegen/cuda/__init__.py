"""CUDA for NVIDIA GPUs with sparse tensor cores: a specification in, readable text and a compiled cubin out.

`spec` says what a kernel computes, `layout` how packed weights lie in memory, `pack` puts them there, `emit` writes the
text out of ``templates/``, `nvrtc` compiles it (no GPU, no driver), `sass` reads what came out, `launch` runs it.
"""
