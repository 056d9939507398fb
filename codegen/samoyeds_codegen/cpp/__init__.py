"""C++ for CPUs: a specification in, readable text and a loaded callable out.

`spec` says what a kernel computes, `isa` for which instructions, `emit` writes it, `samoyeds_codegen.build` compiles
and loads it, `kernel` calls it. The text itself lies in ``templates/``, one kernel per file.
"""
