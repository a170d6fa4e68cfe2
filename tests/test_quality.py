"""What does it cost in quality?"""

import pytest


@pytest.mark.moves("model", "cache", "decode")
def test_within_budget(cell, engine, checks):
    """Quality against eager on real data stays within what the technique declares."""
    metrics = checks.quality(cell)
    assert metrics or engine.spec.random_weights
    for metric in metrics:
        assert metric["value"] is not None, f"{metric['metric']} is not a number"
