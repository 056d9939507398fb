"""The pipeline without the backend, for people who own theirs: in Inductor's pass slots, and on exported programs.

torch._inductor.config.pre_grad_custom_pass = SamoyedsPass()       # or as an option of torch.compile, or of vLLM
program = rewrite_exported(torch.export.export(model, args))       # then AOTInductor, or run it
"""

from samoyeds_compile.passes.exported import rewrite_exported
from samoyeds_compile.passes.pre_grad import SamoyedsPass

__all__ = ["SamoyedsPass", "rewrite_exported"]
