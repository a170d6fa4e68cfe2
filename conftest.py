"""The plugins of the study, one per concern (tests/plugins)."""

pytest_plugins: list[str] = []
