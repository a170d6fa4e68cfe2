"""Fewer bits per weight and activation: our own schemes, and the libraries' as peers."""

from . import fp8, int4, int8, peers

__all__ = ["fp8", "int4", "int8", "peers"]
