"""Where and with how many threads the study runs; one GPU per xdist worker."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("study: machine")
    group.addoption("--device", default=None, help="cpu, cuda or cuda:N (default: cuda if present)")
    group.addoption(
        "--threads", type=int, default=None, help="CPU threads, equal on all sides (default: cores)"
    )


def pytest_configure(config):
    if config.option.help:
        return
    _require("REQUIRE_GPU", "a CUDA device", _cuda_is_there)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        _pin_one_gpu(int(worker.removeprefix("gw")))
    import torch

    device = config.option.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config.study_device = str(torch.device(device))
    except RuntimeError:
        raise pytest.UsageError(
            f"unknown device {device!r}; write --device cpu, cuda or cuda:N"
        ) from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--device {device}: no CUDA device here; take --device cpu, or a CUDA build of torch"
        )
    threads = config.option.threads
    if threads is not None and threads < 1:
        raise pytest.UsageError(f"--threads {threads} is not positive; write --threads 2")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // workers))


def pytest_report_header(config):
    import torch

    return f"study: device {config.study_device}, {torch.get_num_threads()} threads"


def _require(variable, what, there):
    """A run that must not pass by skipping everything says so at the start (exit code 4)."""
    if os.environ.get(variable, "0") not in ("", "0") and not there():
        raise pytest.UsageError(f"{variable} is set and this machine lacks {what}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """``-n auto`` on a machine with GPUs: one worker per GPU."""
    wanted = config.option.device
    return _gpu_count() or None if wanted is None or wanted.startswith("cuda") else None


def _cuda_is_there():
    import torch

    return torch.cuda.is_available()


def _pin_one_gpu(worker: int) -> None:
    """Before CUDA starts: worker n sees GPU n modulo their number, and only that one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(_gpu_count())]
    if gpus and gpus != [""]:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]


def _gpu_count() -> int:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except Exception:  # no driver, no library: no GPU
        return 0


@pytest.fixture(scope="session")
def device(request) -> str:
    """The torch device of this run."""
    return request.config.study_device
