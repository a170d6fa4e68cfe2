"""Several requests in one forward: a step reads the weights once, however many rows it serves.

tokens/s = B / max((W + KV read) / bandwidth, 2 P B / FLOPS): up to the batch where arithmetic
takes over, the rows of a step are nearly free.  The schedulers differ in what the rows do while
requests of different lengths come and go.
"""

from . import continuous, peers, schedulers

__all__ = ["continuous", "peers", "schedulers"]
