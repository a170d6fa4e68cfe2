"""Three cells; the second may end the run, as the environment says."""

import os

ENDS = os.environ.get("INNER_ENDS", "")


def test_first(measure):
    measure(measure.product)


def test_second(measure):
    if ENDS == "ctrl-c":
        raise KeyboardInterrupt
    if ENDS == "crash":
        os._exit(9)
    measure(measure.product)


def test_third(measure):
    measure(measure.product, measure.product)
