"""A spec for random decoders that tests make up."""

from impl.models import ModelSpec

SPEC = ModelSpec(
    "tiny", "decoder", frozenset({"generate", "lean", "linear", "attention"}),
    "random decoder of a test", random_weights=True, source="random")  # fmt: skip
