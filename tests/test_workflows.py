"""CI calls only what exists: targets, commands, options."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from ncu.__main__ import arguments as ncu_arguments
from reports.__main__ import COMMANDS, arguments
from tests.inner import fresh_pytest

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
    """Arguments of every call of `tool` ('make', 'pytest', 'reports', 'ncu') in all workflows."""
    module = [".venv/bin/python", "-m", tool]
    ways = {"make": [["make"]], "pytest": [[".venv/bin/pytest"], module]}.get(tool, [module])
    for path in WORKFLOWS:
        for words in commands(path):
            for way in ways:
                for i in range(len(words) - len(way) + 1):
                    if words[i : i + len(way)] == way:
                        yield words[i + len(way) :]


@pytest.fixture(scope="module")
def pytest_options():
    done = fresh_pytest("--help")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout))


def options_of(words):
    return [word.partition("=")[0] for word in words if word.startswith("-")]


def test_there_are_a_cpu_a_gpu_and_a_comment_workflow():
    assert [path.stem for path in WORKFLOWS] == ["comment", "cpu", "gpu"]
    assert all(jobs(path) for path in WORKFLOWS)


def test_every_push_is_linted():
    cpu = ROOT / ".github/workflows/cpu.yml"
    on = yaml.safe_load(cpu.read_text(encoding="utf-8"))[True]  # YAML's reading of `on`
    assert {"push", "pull_request"} <= on.keys()
    assert ["make", "lint"] in list(commands(cpu))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, flags=re.M)[1]
    for tool in ("ruff check .", "ruff format --check .", "mypy"):
        assert f"$(BIN)/{tool}\n" in recipe


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    called = [[w for w in words if "=" not in w and w not in ("-C", "base")]
              for words in calls("make")]  # fmt: skip
    assert called
    assert {target for words in called for target in words} <= targets


def test_every_pytest_option_exists(pytest_options):
    found = list(calls("pytest"))
    for tool in ("reports", "ncu"):
        found += [words[words.index("--") + 1 :] for words in calls(tool) if "--" in words]
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


def test_every_ncu_command_parses():
    (words,) = calls("ncu")
    options = ncu_arguments().parse_args(words[: words.index("--")])
    assert options.expression
    assert all((ROOT / test).exists() for test in options.tests)


def test_only_what_names_no_host_leaves_the_ncu_job():
    gpu = jobs(ROOT / ".github/workflows/gpu.yml")
    assert gpu["ncu"]["env"]["REQUIRE_NCU"] == "1"
    (upload,) = [s for s in gpu["ncu"]["steps"] if "upload" in s.get("uses", "")]
    assert upload["with"]["path"] == "reports/out/ncu/*.json"


def test_every_sanitizer_runs_at_night():
    job = jobs(ROOT / ".github/workflows/gpu.yml")["sanitize"]
    tools = {entry["tool"] for entry in job["strategy"]["matrix"]["include"]}
    assert tools == {"memcheck", "racecheck", "synccheck"}
    assert "--error-exitcode=1" in job["steps"][-1]["run"]


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
