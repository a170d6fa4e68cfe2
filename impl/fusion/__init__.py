"""Operations joined into one, so that intermediate results never leave the processor's caches."""

from . import activations, norms, projections, sampling, steps

__all__ = ["activations", "norms", "projections", "sampling", "steps"]
