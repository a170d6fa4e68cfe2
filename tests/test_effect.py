"""Is the technique really on?"""


def test_engaged(cell, engine, checks):
    """Every technique of the stack shows in bytes, kernels, counters or the trace."""
    assert checks.effect(cell)
