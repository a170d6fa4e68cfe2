"""Which counters are asked for, by compute capability, and the roofs that a kernel is held to.

Names outside a section stop ncu *after* the launch of a test, so every name here is checked
against NVIDIA's own list per chip (``tests/data/ncu_metrics_*.txt``).  ``launch__*`` and
theoretical occupancy come with their sections only.
"""

from dataclasses import dataclass

from impl.core import StudyError

Capability = tuple[int, int]

SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "WarpStateStats",
    "SchedulerStats",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
)
SETS = {  # name -> (sections, whether the roofs' counters are collected too)
    "roofline": (SECTIONS, True),
    "launch": (("SpeedOfLight", "LaunchStats", "Occupancy"), False),
    "full": ((), True),
}

TIME = "gpu__time_duration.sum"  # ns
CLOCK = "smsp__cycles_elapsed.avg.per_second"  # of the SMs while the kernel ran, not a boost clock
SM_BUSY = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY_BUSY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM_BUSY = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM_RATE = "dram__bytes.sum.per_second"
DRAM_PEAK = "dram__bytes.sum.peak_sustained"  # bytes per DRAM cycle
DRAM_CLOCK = "dram__cycles_elapsed.avg.per_second"
L2_HITS = "lts__t_sector_hit_rate.pct"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
OCCUPANCY_LIMIT = "sm__maximum_warps_per_active_cycle_pct"
LATENCY = "smsp__average_warp_latency_per_inst_issued.ratio"
REGISTERS = "launch__registers_per_thread"
WAVES = "launch__waves_per_multiprocessor"
GRID, BLOCK = "launch__grid_size", "launch__block_size"
SHARED = "launch__shared_mem_per_block"
STALL_PREFIX = "smsp__average_warps_issue_stalled_"
STALL_SUFFIX = "_per_issue_active.ratio"
LIMIT_PREFIX = "launch__occupancy_limit_"
DEVICE_NAME = "device__attribute_display_name"
CAPABILITY = (
    "device__attribute_compute_capability_major",
    "device__attribute_compute_capability_minor",
)

COMMON = (
    TIME, CLOCK, SM_BUSY, MEMORY_BUSY, DRAM_BUSY, DRAM_RATE, DRAM_PEAK, DRAM_CLOCK, L2_HITS,
    OCCUPANCY, LATENCY,
)  # fmt: skip
KEPT = (*COMMON, OCCUPANCY_LIMIT, REGISTERS, WAVES, GRID, BLOCK, SHARED)


@dataclass(frozen=True)
class Roof:
    """Most arithmetic per SM cycle of one kind, and what counts how much of it was done.

    done         names and weights: FLOPs are the sum of weight x value
    per_cycle    whether ``done`` is already divided by the elapsed cycles
    peak         name of the most per cycle over the whole chip, dense; ``peak_weight`` FLOPs each
    since, until compute capabilities that have these names, ``until`` excluded
    """

    kind: str
    done: tuple[tuple[str, float], ...]
    peak: str
    peak_weight: float = 1.0
    per_cycle: bool = False
    since: Capability = (7, 5)
    until: Capability = (99, 0)

    def names(self) -> list[str]:
        """Every counter this roof needs."""
        return [*(name for name, _ in self.done), self.peak]


def _tensor(kind: str, done: str, peak: str, since: Capability, until: Capability) -> Roof:
    names = tuple((f"sm__ops_path_tensor_{name}.sum", 1.0) for name in done.split())
    return Roof(f"{kind} tensor", names, f"sm__ops_path_tensor_{peak}.sum.peak_sustained",
                since=since, until=until)  # fmt: skip


# the peak of an unqualified `src_bf16` on sm_90 is the sparse one, twice the dense: hence hgmma's
AMPERE, ADA, HOPPER, NEXT = (8, 0), (8, 9), (9, 0), (10, 0)
_FP32 = "smsp__sass_thread_inst_executed_op_{}_pred_on.sum.per_cycle_elapsed"
ROOFS = (
    Roof(
        "fp32",
        ((_FP32.format("fadd"), 1.0), (_FP32.format("fmul"), 1.0), (_FP32.format("ffma"), 2.0)),
        "sm__sass_thread_inst_executed_op_ffma_pred_on.sum.peak_sustained",
        peak_weight=2.0,
        per_cycle=True,
    ),
    _tensor("fp16", "src_fp16", "op_hgmma_src_fp16_sparsity_off", HOPPER, NEXT),
    _tensor("bf16", "src_bf16_dst_fp32", "op_hgmma_src_bf16_dst_fp32_sparsity_off", HOPPER, NEXT),
    _tensor("tf32", "src_tf32_dst_fp32", "op_hgmma_src_tf32_dst_fp32_sparsity_off", HOPPER, NEXT),
    _tensor("fp8", "src_fp8", "src_fp8_sparsity_off", HOPPER, NEXT),
    _tensor("int8", "src_int8", "op_igmma_src_int8_sparsity_off", HOPPER, NEXT),
    _tensor("fp16", "src_fp16_dst_fp16 src_fp16_dst_fp32", "src_fp16_dst_fp32_sparsity_off",
            AMPERE, HOPPER),
    _tensor("bf16", "src_bf16_dst_fp32", "src_bf16_dst_fp32_sparsity_off", AMPERE, HOPPER),
    _tensor("tf32", "src_tf32_dst_fp32", "src_tf32_dst_fp32_sparsity_off", AMPERE, HOPPER),
    _tensor("int8", "src_int8", "src_int8_sparsity_off", AMPERE, HOPPER),
    _tensor("fp8", "src_fp8", "src_fp8_sparsity_off", ADA, HOPPER),
)  # fmt: skip


def roofs(capability: Capability | None) -> list[Roof]:
    """Roofs whose counters this chip has; none where the chip is unknown."""
    return [r for r in ROOFS if capability and r.since <= capability < r.until]


def names(capability: Capability | None) -> list[str]:
    """Counters to ask for by name: the common ones, and those of the chip's roofs."""
    found = [*COMMON, *(name for roof in roofs(capability) for name in roof.names())]
    return list(dict.fromkeys(found))


def chosen(which: str, capability: Capability | None) -> tuple[tuple[str, ...], list[str]]:
    """(sections, metric names) of ``--metrics``: a set, or counters to add to ``roofline``.

    Raises ``StudyError`` for a word that is neither.
    """
    if which in SETS:
        sections, with_roofs = SETS[which]
        return sections, names(capability) if with_roofs else []
    added = [word.strip() for word in which.split(",") if word.strip()]
    if not added or not all("__" in word for word in added):
        raise StudyError(
            f"--metrics {which} is neither a set ({', '.join(SETS)}) nor a list of counters such "
            "as dram__bytes_read.sum,lts__t_sectors.sum"
        )
    return SECTIONS, list(dict.fromkeys([*names(capability), *added]))
