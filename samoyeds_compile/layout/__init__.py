"""Layout propagation: which layouts there are, what they cost, and which to take for each range of token counts.

`algebra` names layouts (``samoyeds::convert_layout`` turns one into another), `declare` says which of them each op
reads and writes and at what cost, `machine` has the constants of this machine (`rates`), by default those that were
`measured` on two, `calibrate` measures them, `cut` and `assign` find the cheapest assignment, `regimes` solves for the
numbers of tokens at which it changes, `plan` is what a kernel and a report are told of it, `gpu` plans blocks on GPUs,
and `propagate` is the pass.
"""
