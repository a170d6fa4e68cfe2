"""CI calls only what exists: targets, commands, options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reports.__main__ import COMMANDS, arguments

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def commands(path):
    """Every command line of a workflow as words, shell variables replaced by a word."""
    for job in jobs(path).values():
        for step in job["steps"]:
            for line in step.get("run", "").replace("\\\n", " ").splitlines():
                plain = re.sub(r"\$\{?\w+\}?", "x", line).strip("(){} ")
                for part in re.split(r"&&|\|\||\||;", plain):
                    try:
                        words = shlex.split(part.strip("() "))
                    except ValueError:  # half of a quoted text: no command of ours
                        continue
                    if words:
                        yield words


def calls(tool):
    """Arguments of every call of `tool` ('make', 'pytest', 'reports') in all workflows."""
    ways = {"make": ["make"], "pytest": [".venv/bin/pytest"],
            "reports": [".venv/bin/python", "-m", "reports"]}[tool]  # fmt: skip
    for path in WORKFLOWS:
        for words in commands(path):
            for i in range(len(words) - len(ways) + 1):
                if words[i : i + len(ways)] == ways:
                    yield words[i + len(ways) :]


@pytest.fixture(scope="module")
def pytest_options():
    done = subprocess.run([sys.executable, "-m", "pytest", "--help"], cwd=ROOT, check=True,
                          capture_output=True, text=True)  # fmt: skip
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout))


def options_of(words):
    return [word.partition("=")[0] for word in words if word.startswith("-")]


def test_there_are_a_cpu_a_gpu_and_a_comment_workflow():
    assert [path.stem for path in WORKFLOWS] == ["comment", "cpu", "gpu"]
    assert all(jobs(path) for path in WORKFLOWS)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    called = [[w for w in words if "=" not in w and w not in ("-C", "base")]
              for words in calls("make")]  # fmt: skip
    assert called
    assert {target for words in called for target in words} <= targets


def test_every_pytest_option_exists(pytest_options):
    found = list(calls("pytest"))
    found += [words[words.index("--") + 1 :] for words in calls("reports") if "--" in words]
    text = "\n".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    found += [shlex.split(args) for args in re.findall(r'ARGS="(.*?)"', text)]
    assert len(found) >= 4
    for words in found:
        assert set(options_of(words)) <= pytest_options, words


def test_every_reports_command_parses():
    found = list(calls("reports"))
    assert len(found) >= 4
    for words in found:
        cut = words.index("--") if "--" in words else len(words)
        assert arguments().parse_args(words[:cut]).command in COMMANDS


def test_the_makefile_calls_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = set(re.findall(r"-m reports (\w+)", makefile))
    assert called
    assert called <= set(COMMANDS)


def test_a_gpu_job_cannot_pass_by_skipping():
    gpu = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text(encoding="utf-8"))
    assert gpu["env"]["REQUIRE_GPU"] == "1"
    assert gpu["jobs"]["gpu"]["runs-on"] == ["self-hosted", "gpu"]


def test_code_of_a_pull_request_never_holds_a_token_that_writes():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        writes = "write" in workflow["permissions"].values()
        uses = [step.get("uses", "") for job in workflow["jobs"].values() for step in job["steps"]]
        checks_out = any(use.startswith("actions/checkout") for use in uses)
        assert not (writes and checks_out), path.name
        assert "pull_request_target" not in path.read_text(encoding="utf-8")
