"""Kernel generation for Samoyeds: specifications in, text and loaded callables out.

This package knows nothing of FX graphs or models; `samoyeds_compile` depends on it, never the other way round.
"""
