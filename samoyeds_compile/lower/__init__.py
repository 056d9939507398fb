"""Canonical op -> stage ops -> kernels."""
