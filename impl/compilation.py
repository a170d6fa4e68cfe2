"""Steps turned into generated code."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .baseline import hf_generate, serve_one_by_one
from .core import Engine, NotEngaged, technique
from .fidelity import same_tokens
from .kv_cache import preallocated

MAX_WIDTH = 16  # tokens a row: wider calls are prefills, bound by arithmetic, and stay eager
MAX_ROWS = 8  # of a matrix product that is worth generating instead of calling a library


def _own_code(function: Callable, name: str) -> Callable:
    """A copy with its own code object: dynamo keeps compiled code per code object, so each shape
    has one entry, one lookup, and never a recompile of another shape's.
    """
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, None, function.__closure__)


class Compiled:
    """Calls ``module`` through one compiled function per shape of its arguments.

    The shapes are looked up here, so the guards that dynamo would check at every call (a list of
    all weights: 0.1 ms for six layers) are dropped.  ``calls`` counts calls of compiled code,
    ``seconds`` the first call of each shape.
    """

    def __init__(self, module: nn.Module, options: dict[str, Any]):
        self.module, self.options = module, options
        self.functions: dict[tuple, Callable] = {}
        self.calls, self.seconds = 0, 0.0

    def __call__(self, ids: Tensor, positions: Tensor, cache) -> Tensor:
        ids, positions = ids.contiguous(), positions.contiguous()  # strides are compiled in too
        key = (*ids.shape, cache.max_len, cache.slots, cache.batch)
        self.calls += 1
        if (function := self.functions.get(key)) is not None:
            return function(ids, positions, cache)
        module, start = self.module, time.perf_counter()

        def step(ids, positions, cache):
            return module(ids, positions, cache)

        name = f"step_{'_'.join(map(str, key))}"
        function = torch.compile(
            _own_code(step, name), fullgraph=True, dynamic=False, options=self.options
        )
        with torch.inference_mode():
            out = function(ids, positions, cache)
        self.functions[key] = function
        self.seconds += time.perf_counter() - start
        return out


class CompiledDecoder(nn.Module):
    """A lean decoder whose steps of few tokens run compiled; every other call runs it as it is."""

    def __init__(self, eager: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.eager, self.options = eager, options
        self.step = Compiled(eager, options)
        self.companions: list[Compiled] = []

    @property
    def config(self):
        return self.eager.config

    @property
    def compiled(self) -> list[Compiled]:
        return [self.step, *self.companions]

    def extend_positions(self, length: int) -> None:
        """Tables for ``length`` positions.  Compiled steps hold them as inputs of fixed size, so
        growing them starts the compiled steps afresh.
        """
        before = len(self.eager.cos)
        self.eager.extend_positions(length)
        if len(self.eager.cos) != before:
            self.step.functions.clear()

    def compile_like(self, module: nn.Module) -> Compiled:
        """``module(ids, positions, cache)``, a draft's steps, compiled as this one's."""
        self.companions.append(Compiled(module, self.options))
        return self.companions[-1]

    def forward(self, ids: Tensor, positions: Tensor | int | None = None, cache=None,
                last_only: bool = False, columns: Tensor | None = None) -> Tensor:  # fmt: skip
        narrow = isinstance(positions, Tensor) and ids.shape[1] <= MAX_WIDTH
        if narrow and not last_only and cache is not None and not cache.lockstep:
            return self.step(ids, positions, cache)
        return self.eager(ids, positions, cache, last_only, columns)


def skinny_products():
    """A compiler pass: a product of few rows becomes dot products in the generated code.

    y_mn = sum_k x_mk w_nk for M <= 8 rows reads every weight once and is bound by that read.  A
    library's matrix product is made for large M; generated, all M sums share one pass over the
    weights in the layout they have, and a conversion from int8 or bf16 happens in registers.
    Measured on 2 cores of an AMD EPYC (Zen 5), 1 thread, all 31 products of lm_small: M = 1 fp32
    1.4 ms against 4.2 in MKL, bf16 1.1 against 4.8, int8 0.6 against 1.6 for ``int8pack``; M = 5
    fp32 2.9 against 6.6, M = 8 about equal for bf16.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class SkinnyProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            rewrite_skinny_products(graph)

        def uuid(self):
            return get_hash_for_files((__file__,))

    return SkinnyProducts()


def rewrite_skinny_products(graph: torch.fx.Graph) -> int:
    """Replace mm and addmm of at most ``MAX_ROWS`` rows on CPU; how many were replaced."""
    aten, convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
    replaced = 0
    products = [
        node
        for target in (aten.mm.default, aten.addmm.default)
        for node in graph.find_nodes(op="call_function", target=target)
    ]
    for node in products:
        if node.kwargs:  # addmm with other factors than one
            continue
        *bias, x, w = node.args
        rows, value = x.meta["val"].shape[0], node.meta["val"]
        if not (isinstance(rows, int) and rows <= MAX_ROWS and value.device.type == "cpu"):
            continue

        def call(op, *args, **kwargs):
            made = graph.call_function(op, args, kwargs)
            made.meta["val"] = op(*_values(args), **kwargs)
            return made

        def single(tensor, call=call):
            if tensor.meta["val"].dtype == torch.float32:
                return tensor
            return call(convert, tensor, torch.float32)

        with graph.inserting_before(node):
            weight = single(call(aten.permute.default, w, [1, 0]))  # (N, K)
            sums = [
                call(aten.sum.dim_IntList,
                     call(aten.mul.Tensor, single(call(aten.select.int, x, 0, m)), weight), [1])
                for m in range(rows)]  # fmt: skip
            out = call(aten.cat.default, [call(aten.unsqueeze.default, s, 0) for s in sums])
            if bias:
                out = call(aten.add.Tensor, out, single(bias[0]))
            if value.dtype != torch.float32:
                out = call(convert, out, value.dtype)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        replaced += 1
    return replaced


def _values(args):
    return torch.fx.node.map_arg(args, lambda n: n.meta["val"])


def _options(device: torch.device) -> dict[str, Any]:
    """Options of the compiler for a decoder's step."""
    no_guards = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    if device.type != "cpu":
        return no_guards
    # cpp_wrapper: one C++ function calls the kernels of a step, 0.4 ms less than from Python
    return {**no_guards, "cpp_wrapper": True, "post_grad_custom_pre_pass": skinny_products()}


def _compiled_code_runs(engine: Engine, run) -> str:
    """Compiled code is entered, as whole graphs, and a second run compiles nothing new."""
    from torch._dynamo.utils import counters

    if engine.stats.get("compiled_by") == "transformers":
        return _compiled_regions_traced(engine, run)
    parts = getattr(engine.model, "compiled", None)
    if parts is None:
        raise NotEngaged(f"the model is {type(engine.model).__name__}: nothing of it is compiled")
    broken = sum(counters["graph_break"].values())
    run()
    calls, graphs = sum(p.calls for p in parts), counters["stats"]["unique_graphs"]
    run()
    parts = engine.model.compiled
    entered, shapes = sum(p.calls for p in parts) - calls, sum(len(p.functions) for p in parts)
    breaks = sum(counters["graph_break"].values()) - broken
    again = counters["stats"]["unique_graphs"] - graphs
    if not entered or not shapes:
        raise NotEngaged("the compiled code was never entered")
    if breaks or again:
        raise NotEngaged(f"{breaks} graph breaks, {again} graphs compiled in a second run")
    engine.stats.update(graph_breaks=breaks, recompiles=again, compiled_shapes=shapes,
                        compile_s=sum(p.seconds for p in parts))  # fmt: skip
    return (
        f"{entered} calls of compiled code in a run, {shapes} shapes, 0 graph breaks, "
        f"0 recompiles, {engine.stats['compile_s']:.0f} s to compile"
    )


class CompiledModule(nn.Module):
    """A module run through ``torch.compile``, one compiled function per shape of its inputs."""

    def __init__(self, eager: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.eager, self.options = eager, options
        self.functions: dict[tuple, Callable] = {}
        self.calls, self.seconds = 0, 0.0

    @property
    def compiled(self) -> list[CompiledModule]:
        return [self]

    def forward(self, *args, **kwargs):
        tensors = [*args, *kwargs.values()]
        key = (len(args), *kwargs, *((*t.shape, t.dtype) for t in tensors))
        self.calls += 1
        if (function := self.functions.get(key)) is not None:
            return function(*args, **kwargs)
        module, start = self.eager, time.perf_counter()

        def call(*args, **kwargs):
            return module(*args, **kwargs)

        function = torch.compile(
            _own_code(call, f"call_{len(self.functions)}"), fullgraph=True, dynamic=False,
            options=self.options)  # fmt: skip
        with torch.inference_mode():
            out = function(*args, **kwargs)
        self.functions[key] = function
        self.seconds += time.perf_counter() - start
        return out


@technique(phase="compile", replaces="compiler", needs={"linear"}, requires={"compiler"},
           fidelity=same_tokens, effect=_compiled_code_runs,
           peer="peer_compiled_static")  # fmt: skip
def torch_compile(engine: Engine) -> Engine:
    """time per step -> bytes of weights / bandwidth: one graph, fused, without Python between.

    A decoder's steps of up to 16 tokens compile with a static KV cache (brought along), prefills
    stay eager; other models compile whole.  On CPU, products of up to 8 rows are generated with
    the rest instead of called (``skinny_products``).
    Helps when the framework costs as much as the arithmetic, and where fusion saves memory
    traffic.  Does not for long prefills, for shapes that keep changing (each costs a compilation
    of seconds), or for a program that ends before that is repaid.
    Source: Ansel et al. 2024, https://pytorch.org/assets/pytorch2-2.pdf
    """
    # no torch._dynamo.reset(): it would drop the code of other engines that are measured beside
    # this one; code belongs to the function of its shape and goes with it
    if "lean" in engine.spec.needs and engine.new_cache is not None:
        if engine.new_cache(1, 1).lockstep:
            engine.new_cache = preallocated(engine)
        engine.model = CompiledDecoder(engine.model, _options(engine.device)).eval()
    elif "generate" in engine.spec.needs:  # a decoder that only transformers can run
        return _compiled_by_transformers(engine)
    else:
        options = {k: v for k, v in _options(engine.device).items() if k != "cpp_wrapper"}
        engine.model = CompiledModule(engine.model, options).eval()
    return engine


def _compiled_regions_traced(engine: Engine, run) -> str:
    """The profiler sees compiled regions, one a token after the first, and no graph broken."""
    from torch._dynamo.utils import counters

    run()
    broken = sum(counters["graph_break"].values())
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profiler:
        run()
    names = [e.name() for e in profiler.profiler.kineto_results.events()]
    regions = sum(name.startswith("Torch-Compiled Region") for name in names)
    if not regions:
        raise NotEngaged("transformers' generate entered no compiled code")
    if breaks := sum(counters["graph_break"].values()) - broken:
        raise NotEngaged(f"transformers' compiled step broke into {breaks + 1} graphs")
    return f"{regions} calls of compiled code in transformers' generate, 0 graph breaks"


@technique(phase="load", host="transformers", replaces=("host", "cache", "compiler"),
           needs={"generate", "lean"}, requires={"compiler"}, fidelity=same_tokens,
           effect=_compiled_regions_traced)  # fmt: skip
def peer_compiled_static(engine: Engine) -> Engine:
    """transformers' ``generate`` with a static cache and its own compiled step.

    What ``generate`` does on accelerators, asked for on CPUs too; prompts run uncompiled.  A cache
    is as long as a call needs, so each new total length compiles a step again.
    Source: https://huggingface.co/docs/transformers/llm_optims#static-kv-cache-and-torchcompile
    """
    engine.stats["host"] = "transformers"
    return _compiled_by_transformers(engine)


def _compiled_by_transformers(engine: Engine) -> Engine:
    from transformers import CompileConfig

    config = CompileConfig(mode="default", fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # the only way to ask for it on a CPU
    engine.stats["compiled_by"] = "transformers"
    engine.generate = hf_generate(
        engine.model, cache_implementation="static", compile_config=config
    )
    engine.serve = serve_one_by_one(engine)
    return engine
