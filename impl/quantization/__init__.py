"""Fewer bits per weight and activation: our own schemes, and the libraries' as peers."""

from . import int4, int8, peers

__all__ = ["int4", "int8", "peers"]
