"""The plugins of the study, one per concern (tests/plugins)."""

pytest_plugins = [
    "tests.plugins.machine",
    "tests.plugins.trace",
    "tests.plugins.bench",
    "tests.plugins.summary",
]
