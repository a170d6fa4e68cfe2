"""The plugins of the study, one per concern (tests/plugins)."""

pytest_plugins = [
    "tests.plugins.turns",
    "tests.plugins.devices",
    "tests.plugins.cells",
    "tests.plugins.kernels",
    "tests.plugins.engines",
    "tests.plugins.shard",
    "tests.plugins.machine",
    "tests.plugins.trace",
    "tests.plugins.ncu",
    "tests.plugins.bench",
    "tests.plugins.sides",
    "tests.plugins.summary",
    "tests.plugins.constructed",
]
