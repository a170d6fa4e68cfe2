"""Is the answer still right?"""


def test_same_output_as_without(cell, engine, checks):
    """Exact members equal the stack without them; lossy ones stay within their noise."""
    assert checks.same_output(cell)
