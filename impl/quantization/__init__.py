"""Fewer bits per weight and activation: our own schemes, and the libraries' as peers."""

from . import int8, peers

__all__ = ["int8", "peers"]
