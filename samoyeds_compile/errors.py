"""What can go wrong, one class per cause; each message names the culprit, the reason and the remedy."""

from __future__ import annotations


class SamoyedsError(Exception):
    """Base of every error that Samoyeds raises on purpose."""


class OptionError(SamoyedsError, ValueError):
    """An option, mode or environment variable that does not exist or has a value of the wrong kind."""


class OperandError(SamoyedsError, ValueError):
    """An operand of a `samoyeds::` op whose shape, dtype or device does not fit the others."""


class GraphInvariantError(SamoyedsError, RuntimeError):
    """A pipeline step left a graph that is not well formed; the original graph is compiled instead."""


class DumpError(SamoyedsError, LookupError):
    """A dump folder, or a block in one, that is not there."""


class IntegrationError(SamoyedsError, TypeError):
    """Something that an integration cannot work on, or a description of experts that does not fit them."""


class SparsityError(SamoyedsError, ValueError):
    """A sparse pattern that does not exist, or a weight that does not fit the pattern it should have."""


class DistributedError(SamoyedsError, RuntimeError):
    """Ranks of one program that compiled different collectives or rewrote different blocks."""


class CheckpointError(SamoyedsError, ValueError):
    """A file of packed weights that is damaged, of another version, or of another model."""


class LayoutError(SamoyedsError, ValueError):
    """A layout, or the declaration of an op's layouts, makes no sense."""
