"""Constructed input for the tests of ncu: nothing here was measured."""

from ncu import metrics

FFMA = "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum.per_cycle_elapsed"
BF16 = "sm__ops_path_tensor_src_bf16_dst_fp32.sum"


def node(name="a", skip=None):
    cell = {"techniques": ["rms_norm_triton"], "model": "none", "device": "cuda"}
    return {"nodeid": f"tests/test_x.py::test_{name}", "device": "cuda", "cell": cell, "skip": skip}


def kernel(**changes):
    """Metrics of a made-up kernel on a chip of round numbers: DRAM 4 TB/s, fp32 64 TFLOP/s."""
    values = {
        metrics.TIME: 100_000.0, metrics.CLOCK: 2e9, metrics.SM_BUSY: 20.0,
        metrics.MEMORY_BUSY: 30.0, metrics.DRAM_BUSY: 25.0, metrics.DRAM_RATE: 1e12,
        metrics.DRAM_PEAK: 2000.0, metrics.DRAM_CLOCK: 2e9, metrics.OCCUPANCY: 45.0,
        metrics.OCCUPANCY_LIMIT: 50.0, metrics.WAVES: 4.0, metrics.LATENCY: 40.0,
        metrics.GRID: 4096.0, metrics.BLOCK: 256.0, metrics.REGISTERS: 40.0,
        f"{metrics.STALL_PREFIX}long_scoreboard{metrics.STALL_SUFFIX}": 30.0,
        f"{metrics.STALL_PREFIX}barrier{metrics.STALL_SUFFIX}": 10.0,
        "device__attribute_display_name": "Made-up GPU",
        "device__attribute_compute_capability_major": 9.0,
        "device__attribute_compute_capability_minor": 0.0,
    }  # fmt: skip
    for roof in metrics.roofs((9, 0)):
        values |= dict.fromkeys((name for name, _ in roof.done), 0.0)
        values[roof.peak] = 16_000.0 if roof.kind == "fp32" else 500_000.0
    return {k: v for k, v in (values | changes).items() if v is not None}


def as_csv(*kernels, units=True):
    """What ``ncu --import --csv --page raw`` prints."""
    names = sorted(set().union(*kernels)) if kernels else [metrics.TIME]
    head = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Block Size", *names]
    unit = {metrics.TIME: "ns", metrics.DRAM_RATE: "byte/second"}
    lines = [head, ["", "", "", "", "", "block", *(unit.get(n, "") for n in names)]][: 1 + units]
    for i, found in enumerate(kernels):
        values = [format(v, ",") if isinstance(v, float) else v for v in map(found.get, names)]
        about = [str(i), "77", "python3.12", "build-7", "rms_norm_kernel", "(256, 1, 1)"]
        lines.append([*about, *("n/a" if v is None else v for v in values)])
    return "==PROF== Imported\n" + "\n".join(
        ",".join(f'"{cell}"' for cell in line) for line in lines
    )
