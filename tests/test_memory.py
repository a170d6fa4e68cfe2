"""How many bytes does it hold?"""

import pytest

from impl.core import stack
from impl.models.costs import weight_bytes


@pytest.mark.moves("model")
def test_no_weight_is_held_twice(cell, engine, pool):
    """A stack holds at most its baseline's bytes: nothing keeps the weights it replaced alive."""
    baseline = pool.get(stack("eager"), cell)
    names = {t.name for t in cell.techniques}
    if "mixed_precision" in names:  # its islands are fp32: at most all of the model could be
        baseline = pool.get(stack("eager"), cell, "fp32")
    slack = 1.02 if names - {"eager", "lean_decoder"} else 1.0
    assert 0 < weight_bytes(engine.model) <= slack * weight_bytes(baseline.engine.model)
