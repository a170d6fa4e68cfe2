"""Nsight Compute over the tests that measure: ``python -m ncu -k EXPR``."""
