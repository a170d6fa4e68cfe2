"""Triton kernels without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernel_tools import MMA, ROOT

TYPES = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}

AOT = """
import json, sys
from tests.triton_tools import compiled
print(json.dumps(compiled(*sys.argv[1:])))
"""


def compiled_elsewhere(name: str, arch: str) -> dict:
    """``compiled`` in a process of its own; raises with its errors."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", AOT, name, arch], env=env, cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def mend_interpreter() -> None:
    """Let Triton before 3.7 take a loop's bound from an array of one element, as later ones do.

    Its interpreter calls ``int`` of it, which NumPy refuses since 2.5.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        index = lambda self: int(self.handle.data.squeeze())  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


def compiled(name: str, arch: str) -> dict:
    """{version, usage, opcodes} of every kernel and dtype; a process of its own must call this."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"kernels.{name}.triton")
    usage, opcodes = {}, {}
    for label, variant in module.VARIANTS.items():
        kernel = getattr(module, label.split("[")[0])
        for dtype in variant.get("dtypes", TYPES):
            given = variant.get("types", {})
            signature, aligned = {}, {}
            for i, arg in enumerate(kernel.arg_names):
                if arg in variant["constants"]:
                    signature[arg] = "constexpr"
                elif arg.endswith("_ptr"):
                    signature[arg] = given.get(arg, "*" + TYPES[dtype])
                    aligned[(i,)] = [["tt.divisibility", 16]]
                else:
                    signature[arg] = given.get(arg, "fp32" if arg in ("eps", "scale") else "i32")
                    if signature[arg] == "i32":
                        aligned[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(fn=kernel, signature=signature, constexprs=variant["constants"],
                               attrs=aligned)  # fmt: skip
            built = triton.compile(
                source, target=GPUTarget("cuda", int(re.sub(r"\D", "", arch)), 32),
                options={"num_warps": variant["warps"], "num_stages": 3,
                         **variant.get("options", {})})  # fmt: skip
            key = f"{label}-{dtype}"
            usage[key] = _usage(built)
            usage[key]["shared"] = built.metadata.shared
            opcodes[key] = sorted(set(MMA.findall(built.asm["sass"])))
    return {"version": "triton " + triton.__version__, "usage": usage, "opcodes": opcodes}


def _usage(built) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                              text=True, check=True).stdout  # fmt: skip
    number = {k: int(re.search(rf"\b{k}:(\d+)", dump)[1]) for k in ("REG", "STACK", "LOCAL")}
    return {"registers": number["REG"], "stack": number["STACK"], "spills": number["LOCAL"]}
