"""The order inside a cell: prove, check, settle, sample in pairs, check again, then file.

A cell that fails at any step has no time, no row and no JSON entry: filing comes last.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports import schema
from tests.plugins import machine, memory, ncu, sampler, tokens, trace
from tests.plugins.intervals import verdict
from tests.plugins.journal import entry_of
from tests.plugins.sampler import Call, Host, Rounds
from tests.plugins.study import Study
from tests.plugins.tables import Sampling, Sides, TableCell

HIDDEN_WORK = 1.2  # wall over event time of the same calls
PROBES_AGAIN = 5  # before a time is called impossible: a shared machine has slow moments
STREAMS = 5  # generations timed token by token


@dataclass(frozen=True)
class Later:
    """A side built only when its turn comes, after the variant's memory has been measured.

    ``Later(build)``: ``build()`` returns the call.
    """

    build: Callable[[], Call]


@dataclass
class Record:
    """What a cell came to: its record (``extra_info``) and the samples of every side, s/call."""

    info: dict[str, Any]
    seconds: dict[str, list[float]] = field(default_factory=dict)


class Bench:
    """The ``bench`` fixture; see ``__call__``."""

    def __init__(self, benchmark: Any, study: Study, node: Any) -> None:
        self.benchmark, self.study, self.node = benchmark, study, node
        self.sampling = Sampling(study, node.nodeid)

    def __call__(
        self,
        sides: Mapping[str, Call | Later | None],
        inputs: Sequence[Any],
        agree: Callable[[Any, Any], None],
        cell: dict[str, Any],
        *,
        names: Mapping[str, str],
        effect: str | Callable[[], str] | None = None,
        quality: Sequence[dict[str, Any]] = (),
        timing: str = "wall",
        device: Any = None,
        flush: Callable[[], Any] | None = None,
        bytes_moved: float | None = None,
        flops: float | None = None,
        compute_dtype: str | None = None,
        working_set: float | None = None,
        bytes_written: float = 0.0,
        predicted_speedup: float | None = None,
        context: dict[str, int | None] | None = None,
        load_s: float | None = None,
        weight_bytes: int | None = None,
        kv_bytes: int | None = None,
        tokens_per_call: int | None = None,
        requests_per_call: int | None = None,
        stream: Callable[[Any, Any], Any] | None = None,
        change: Callable[[Any], Callable[[], None]] = tokens.change_in_place,
        outputs: Sequence[Any] = (),
        extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = {},  # noqa: B006
        traced: Callable[[], Any] | None = None,
        take_turns: bool = False,
        table: Sequence[TableCell] = (),
    ) -> Record:
        """Check, time and file one cell; returns its record.

        sides       'variant', 'baseline', and where they exist 'without' (the same stack without
                    this technique) and 'peer': ``call(input) -> output``, None, or `Later`.
                    A cell whose variant is its own baseline is an A/A trial.  No baseline: the
                    variant is timed alone (``pairs`` 0, verdict ambiguous)
        inputs      4 or more inputs of equal shape; all sides get the same
        agree       ``agree(output, input)`` raises unless the variant's output is right *for this
                    content* (it is called again on an input changed in place: do not look the
                    reference up by position)
        cell        the record's cell object
        names       what 'baseline', 'without' and 'peer' are called in tables
        effect      the sentence of proof, or a callable that returns it or raises
        quality     records of the schema; one over its budget fails the cell
        timing      'wall', 'event' (device time) or 'graph' (event time of a captured graph)
        device      ``synchronize()`` and ``Event``; default: ``torch.cuda`` or the host
        flush       called before each sample in event and graph mode: cold caches
        bytes_moved, flops      least traffic and arithmetic of one call, from shapes
        compute_dtype, working_set   whose ceilings apply; default: the cell's precision, and the
                    resident weights and cache, or ``bytes_moved``
        bytes_written   of bytes_moved: they are held to the copy probe, the others to the read one
        tokens_per_call, requests_per_call   for the rates; output tokens (prefill: prompt tokens)
        stream      ``stream(input, on_token)``: the variant's call again, timed token by token
        change      gives an input new content in place, returns what undoes it
        outputs     buffers the sides write to: filled with NaN before each check
        extra       further keys of the schema (``accept_rate``, ``p50_ms``, ...), or a callable
                    evaluated after sampling
        traced      what ``--save-trace`` runs; default: the variant on the first input
        take_turns  the sides do not fit into memory together: a call builds what is not there,
                    so each is called once untimed, and rounds are of blocks
        table       the cells of this table that are still to come, this one first: they are
                    sampled together

        Raises AssertionError when a check fails; skips the test, with its estimate as the
        reason, when six pairs do not fit the session.
        """
        variant = _built(sides["variant"])
        assert variant is not None, "a cell has a variant"
        assert len(inputs) >= 4, "a cell has 4 inputs or more, so that no answer is remembered"
        on_cuda = cell["device"].startswith("cuda")
        if device is None:
            device = _cuda() if on_cuda else Host()
        info = schema.empty_record()
        info.update(
            cell=cell, timing=timing, quality=list(quality), context=context,
            baseline=names.get("baseline", "none"), predicted_speedup=predicted_speedup,
            bytes_moved=bytes_moved, flops=flops, weight_bytes=weight_bytes, kv_bytes=kv_bytes,
        )  # fmt: skip

        # 1-3: on, first call, right
        info["effect"] = effect() if callable(effect) else effect
        for buffer in outputs:
            buffer.fill_(math.nan)
        device.synchronize()
        called = time.perf_counter()
        output = variant(inputs[0])
        device.synchronize()
        info.update(first_call_s=time.perf_counter() - called, load_s=load_s)
        _check_count("the variant", output, inputs[0], tokens_per_call, stream is not None)
        agree(output, inputs[0])
        self._check_poisoned(variant, inputs[0], agree, output, device)
        for metric in info["quality"]:
            if schema.over_budget(metric):
                raise AssertionError(
                    f"{metric['metric']} moved by {metric['delta']}, "
                    f"its budget is {metric['budget']}"
                )
        if not self.study.enabled:
            ncu.measured(lambda: variant(inputs[0]), cell["device"],
                         bytes_moved=bytes_moved, flops=flops)  # fmt: skip
            return self.benchmark.pedantic(lambda: Record(info))

        # 4: memory, the variant alone
        self.study.begin_timing()
        if take_turns:
            variant(inputs[0])
        info["peak_bytes"] = memory.peak_bytes(
            lambda: variant(inputs[0]), cell["device"], weight_bytes or 0
        )
        # 5-6: the other sides, pairs
        calls, known = {"variant": variant}, {}
        for side in ("baseline", "without", "peer"):
            if (call := _built(sides.get(side))) is not None:
                calls[side] = call
                called = time.perf_counter()
                output = call(inputs[0])
                device.synchronize()
                known[side] = time.perf_counter() - called
                _check_count(side, output, inputs[0], tokens_per_call, False)
        watch = _watch(timing, device, flush)
        rounds = self.sampling.rounds(info, Sides(calls, known, names), inputs, watch,
                                      table, take_turns)  # fmt: skip
        if take_turns:
            variant(inputs[0])
        if timing == "event":
            _check_hidden_work(variant, inputs, device)
        if on_cuda:
            info["energy_j"] = _energy(variant, inputs, device)
        if stream is not None:
            info.update(_token_times(stream, inputs, device, self.study, self.node.nodeid))

        # 7: nothing remembered
        restore = change(inputs[0])
        try:
            for buffer in outputs:
                buffer.fill_(math.nan)
            output = variant(inputs[0])
            device.synchronize()
            _check_count("the variant", output, inputs[0], tokens_per_call, False)
            agree(output, inputs[0])
        finally:
            restore()

        # 8: the limit, the record, the file
        seconds = statistics.median(rounds.seconds["variant"])
        if tokens_per_call:
            info["tokens_per_s"] = tokens_per_call / seconds
        if requests_per_call:
            info["requests_per_s"] = requests_per_call / seconds
        info.update(extra() if callable(extra) else extra)
        info.update(_ratios(rounds, names, self.study))
        resident = (info["weight_bytes"] or 0) + (info["kv_bytes"] or 0)
        self._limit(
            info, seconds, compute_dtype or cell["precision"],
            working_set or resident or bytes_moved or 1, bytes_written,
        )  # fmt: skip
        info = schema.nulls(info)
        if self.study.trace_folder is not None:
            run = traced or (lambda: variant(inputs[0]))
            info["trace"] = trace.record_cell(run, self.study.trace_folder, self.node.name, cell)
        schema.validate_record(info, self.node.nodeid)
        return self._file(info, rounds)

    def _check_poisoned(
        self, variant: Call, x: Any, agree: Callable[..., None], output: Any, device: Any
    ) -> None:
        """Once more on memory full of NaN: what a call leaves unwritten must not look right."""
        shape = getattr(output, "shape", None)
        if shape is None or not output.is_floating_point():
            return
        poison = [output.new_full(shape, math.nan) for _ in range(4)]
        del poison, output  # the allocator hands these out again
        again = variant(x)
        device.synchronize()
        agree(again, x)

    def _limit(
        self, info: dict[str, Any], seconds: float, dtype: str, working_set: float, written: float
    ) -> None:
        """Fill limit, mfu and mbu; faster than the limit is a failure."""
        ceilings, moved, flops = self.study.ceilings, info["bytes_moved"], info["flops"]
        limit = ceilings.limit(moved, flops, dtype, working_set, written)
        if limit is None:
            return
        for _ in range(PROBES_AGAIN):
            if not limit.beaten_by(seconds):
                break
            ceilings.probe_again(working_set, (dtype,))
            limit = ceilings.limit(moved, flops, dtype, working_set, written)
            assert limit is not None
        fraction = limit.seconds / seconds
        if limit.beaten_by(seconds):
            raise AssertionError(
                f"{seconds * 1e3:.3g} ms is {fraction:.2f} of what the {limit.bound} limit of "
                f"{limit.seconds * 1e3:.3g} ms allows: a wrong byte count, a missing "
                "synchronization, or skipped work"
            )
        info.update(limit_ms=limit.seconds * 1e3, limit_fraction=fraction, bound=limit.bound)
        if flops:
            info["mfu"] = flops / seconds / ceilings.compute_rate(dtype)[0]
        if moved and ceilings.is_dram(working_set):
            info["mbu"] = ceilings.byte_seconds(moved, working_set, written)[0] / seconds

    def _file(self, info: dict[str, Any], rounds: Rounds) -> Record:
        """Journal the record, then replay the samples into pytest-benchmark: the last step."""
        cell, samples = info["cell"], rounds.seconds["variant"]
        self.benchmark.group = f"{cell['model']} {cell['precision']} batch {cell['batch']}"
        self.benchmark.group += f" {cell['workload']}"
        self.benchmark.extra_info.update(info)
        sampler.clock.replay(self.benchmark, samples)
        self.study.keep(self.node.nodeid, self.benchmark.extra_info, samples)
        self.study.journal.append(entry_of(self.benchmark, samples))
        return Record(info, rounds.seconds)


def _built(side: Call | Later | None) -> Call | None:
    return side.build() if isinstance(side, Later) else side


def _cuda() -> Any:
    import torch

    return torch.cuda


def _watch(timing: str, device: Any, flush: Callable[[], Any] | None) -> Any:
    if timing == "wall":
        return sampler.WallWatch(device)
    return {"event": sampler.EventWatch, "graph": sampler.GraphWatch}[timing](device, flush)


def _check_count(side: str, output: Any, given: Any, expected: int | None, must: bool) -> None:
    """Tokens are counted from the ids returned, per request."""
    found = tokens.new_tokens(output, given)
    if found is None or expected is None:
        assert not must or expected is None, f"{side} returned no ids to count tokens in"
        return
    wanted = [getattr(request, "max_new_tokens", None) for request in given]
    for i, (new, asked) in enumerate(zip(found, wanted, strict=True)):
        assert asked is None or new == asked, f"{side}: request {i} got {new} tokens, not {asked}"
    assert sum(found) == expected, f"{side} returned {sum(found)} new tokens, not {expected}"


def _check_hidden_work(variant: Call, inputs: Sequence[Any], device: Any) -> None:
    ratio = sampler.hidden_work(variant, inputs, device)
    assert ratio <= HIDDEN_WORK, (
        f"back-to-back calls take {ratio:.2f} times what their events say: work runs on another "
        "stream; time it as 'wall'"
    )


def _energy(variant: Call, inputs: Sequence[Any], device: Any, seconds: float = 0.5) -> Any:
    """J per call: the GPU's energy counter over half a second of calls; None without NVML."""
    device.synchronize()
    before, start, calls = machine.energy_joules(), time.perf_counter(), 0
    if before is None:
        return None
    while time.perf_counter() - start < seconds:
        variant(inputs[calls % len(inputs)])
        device.synchronize()
        calls += 1
    after = machine.energy_joules()
    return None if after is None else (after - before) / calls


def _token_times(
    stream: Callable[[Any, Any], Any], inputs: Sequence[Any], device: Any, study: Study, name: str
) -> dict[str, float | None]:
    """Medians over generations of the time to the first token and of a later token."""
    clock, first, later = tokens.TokenClock(device.synchronize), [], []
    start, share = time.perf_counter(), study.budget.share(name) / 10
    for x in inputs[:STREAMS]:
        clock.start()
        stream(x, clock)
        assert clock.ttft_ms is not None, "the generation announced no token"
        first.append(clock.ttft_ms)
        later.append(clock.tpot_ms)
        if time.perf_counter() - start > share:
            break
    known = [ms for ms in later if ms is not None]
    return {
        "ttft_ms": statistics.median(first),
        "tpot_ms": statistics.median(known) if known else None,
    }


def _ratios(rounds: Rounds, names: Mapping[str, str], study: Study) -> dict[str, Any]:
    """The record's speed-ups, intervals, stop reason and verdict."""
    found: dict[str, Any] = {"pairs": 0, "stop": rounds.stop, "verdict": "ambiguous"}
    if "baseline" in rounds.seconds:
        ratio = rounds.ratio()
        found.update(
            pairs=len(rounds), speedup=ratio.middle, speedup_low=ratio.low,
            speedup_high=ratio.high,
            verdict=verdict(ratio.low, ratio.high, study.margin()),
        )  # fmt: skip
    for side in ("without", "peer"):
        if side in rounds.seconds:
            ratio = rounds.ratio(side)
            found[side] = {"name": names[side], "speedup": ratio.middle, "low": ratio.low,
                           "high": ratio.high}  # fmt: skip
    return found
