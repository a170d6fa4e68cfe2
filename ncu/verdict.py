"""What holds a kernel back, in one sentence, from the report's own peaks and clocks.

The roofline model: Williams, Waterman, Patterson, *Roofline: an insightful visual performance
model for multicore architectures*, 2009 (https://doi.org/10.1145/1498765.1498785).  A duration
under ncu is never compared with a benchmark's: caches are flushed and clocks differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ncu import metrics as m

BOUND = 0.60  # a side above it names the bound
TOLERANCE = 0.01  # of an invariant within one pass, and above 100 %
ACROSS_PASSES = 0.03  # of counters that ncu reads in different replays of a kernel

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """bound: memory, compute, cache, instruction, latency, size or unknown; and the evidence.

    dram, compute   shares of the peak at the clocks of this run; None where not counted
    roof            kind of the highest arithmetic share
    intensity       FLOP per byte of DRAM traffic
    complaints      invariants that the numbers break
    """

    bound: str
    sentence: str
    dram: float | None = None
    compute: float | None = None
    roof: str | None = None
    intensity: float | None = None
    top_stall: str | None = None
    complaints: list[str] = field(default_factory=list)


def dram_share(found: Metrics) -> float | None:
    """DRAM bytes/s over the most at its clock."""
    values = [found.get(name) for name in (m.DRAM_RATE, m.DRAM_PEAK, m.DRAM_CLOCK)]
    if None in values or not values[1] or not values[2]:
        share = found.get(m.DRAM_BUSY)
        return None if share is None else share / 100
    return float(values[0] / (values[1] * values[2]))


def work(found: Metrics, roof: m.Roof) -> float | None:
    """FLOPs per SM cycle that a kernel did of one kind; None where not counted."""
    done = [(found.get(name), weight) for name, weight in roof.done]
    if any(value is None for value, _ in done):
        return None
    total = sum(value * weight for value, weight in done if value is not None)
    if roof.per_cycle:
        return float(total)
    if not found.get(m.CLOCK) or not found.get(m.TIME):
        return None
    return float(total / (found[m.CLOCK] * found[m.TIME] * 1e-9))


def compute_shares(found: Metrics, capability: m.Capability | None) -> dict[str, float]:
    """Kind of arithmetic -> share of its peak, of the kinds that were counted."""
    shares = {}
    for roof in m.roofs(capability):
        done, peak = work(found, roof), found.get(roof.peak)
        if done is not None and peak:
            shares[roof.kind] = done / (peak * roof.peak_weight)
    return shares


def intensity(found: Metrics, capability: m.Capability | None) -> float | None:
    """FLOP per byte of DRAM; None without either count."""
    counted = [work(found, roof) for roof in m.roofs(capability)]
    done = [w for w in counted if w is not None]
    if not done or not found.get(m.DRAM_RATE) or not found.get(m.CLOCK):
        return None
    return float(sum(done) * found[m.CLOCK] / found[m.DRAM_RATE])


def stalls(found: Metrics) -> dict[str, float]:
    """Reason -> warps waiting for it per issued instruction, the largest first."""
    reasons = {
        name.removeprefix(m.STALL_PREFIX).removesuffix(m.STALL_SUFFIX): value
        for name, value in found.items()
        if name.startswith(m.STALL_PREFIX) and name.endswith(m.STALL_SUFFIX)
        and "not_issued" not in name
    }  # fmt: skip
    return dict(sorted(reasons.items(), key=lambda item: -item[1]))


def complaints(found: Metrics, shares: Mapping[str, float]) -> list[str]:
    """Invariants of ncu's numbers that these break, each a sentence."""
    said = []
    if not (found.get(m.TIME) or 0) > 0:
        said.append("no duration")
    waiting, latency = stalls(found), found.get(m.LATENCY)
    if waiting and latency and abs(sum(waiting.values()) / latency - 1) > ACROSS_PASSES:
        said.append(
            f"the stalls add up to {sum(waiting.values()):.4g}, the latency is {latency:.4g}"
        )
    busy, share = found.get(m.DRAM_BUSY), dram_share(found)
    if busy and share is not None and abs(100 * share - busy) > max(TOLERANCE * busy, 0.1):
        said.append(f"DRAM rate over peak is {100 * share:.4g} %, its throughput {busy:.4g} %")
    percents = {k: v for k, v in found.items() if k in (m.SM_BUSY, m.MEMORY_BUSY, m.DRAM_BUSY)}
    percents |= {kind: 100 * value for kind, value in shares.items()}
    said += [f"{k} is {v:.4g} %" for k, v in percents.items() if v > 100 * (1 + TOLERANCE)]
    return said


def judge(found: Metrics, capability: m.Capability | None) -> Verdict:
    """The verdict on one kernel from its metrics.

    The larger of DRAM and arithmetic above 60 % is the bound.  With both below: what is above 60 %
    on chip (caches, or the SM's own pipes), else under one wave too small a launch, else latency.
    """
    shares, dram = compute_shares(found, capability), dram_share(found)
    top = max(shares.items(), key=lambda item: item[1], default=(None, None))
    waiting, flop_per_byte = stalls(found), intensity(found, capability)
    evidence = [f"{100 * dram:.0f} % of DRAM peak"] if dram is not None else []
    evidence += [f"{_percent(top[1])} of {top[0]}"] if top[1] is not None else []
    if flop_per_byte is not None:
        evidence.append(f"{flop_per_byte:.3g} FLOP/byte")
    sides = {"memory": dram or 0.0, "compute": top[1] or 0.0}
    side = max(sides, key=lambda name: sides[name])
    if dram is None and found.get(m.SM_BUSY) is None:
        bound, lead = "unknown", "no verdict: the report holds no throughput"
    elif sides[side] >= BOUND:
        bound, lead = side, f"{side}-bound"
        if side == "compute":
            evidence[:2] = evidence[1::-1]
    elif (found.get(m.MEMORY_BUSY) or 0) >= 100 * BOUND:
        bound = "cache"
        lead = f"cache-bound: {found[m.MEMORY_BUSY]:.0f} % of the memory path on chip"
    elif (found.get(m.SM_BUSY) or 0) >= 100 * BOUND:
        bound, lead = "instruction", f"instruction-bound: {found[m.SM_BUSY]:.0f} % of an SM pipe"
    elif 0 < (found.get(m.WAVES) or 1) < 1:
        bound, lead = "size", f"too small: {found[m.WAVES]:.2f} of a wave of blocks"
    else:
        bound, lead = "latency", "latency-bound"
        evidence += _waiting(found, waiting)
    said = complaints(found, shares)
    joint = ": " if ":" not in lead else ", "
    sentence = lead + (joint + ", ".join(evidence) if evidence else "")
    if said:
        sentence += f" (doubtful: {'; '.join(said)})"
    return Verdict(bound, sentence, dram, top[1], top[0], flop_per_byte,
                   next(iter(waiting), None), said)  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 or share == 0 else "under 1 %"


def _waiting(found: Metrics, waiting: Mapping[str, float]) -> list[str]:
    said = []
    if (occupancy := found.get(m.OCCUPANCY)) is not None:
        limit = found.get(m.OCCUPANCY_LIMIT)
        most = f" of {limit:.0f} %" if limit is not None else ""
        said.append(f"occupancy {occupancy:.0f} %{most}")
    if waiting:
        reason, warps = next(iter(waiting.items()))
        share = warps / (found.get(m.LATENCY) or sum(waiting.values()) or 1)
        said.append(f"warps wait for {reason.replace('_', ' ')} {100 * share:.0f} % of the time")
    return said
