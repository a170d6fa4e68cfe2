"""llama.cpp over the weights of a ``LeanDecoder``: a peer of the decode step.

The weights are written to a GGUF file bit for bit where its formats hold them (fp32, bf16; int8 of
one scale per row as Q8_0, int4 in groups of 32 as Q4_0, whose scales are fp16), so that both sides
compute the same function; activations are rounded as llama.cpp does it.
Needs the extra ``llama``.  Source of the formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from impl.models.decoder import LeanDecoder, RMSNorm

BLOCK = 32  # numbers that share a scale in Q8_0 and Q4_0


def lacks() -> str | None:
    """Why llama.cpp cannot stand beside ours here, or None."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)} (the extra [llama])" if missing else None


# ---- the file ----------------------------------------------------------------------------


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys in the order of GGUF: the pairs that are rotated stand together."""
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _blocks(scale: Tensor, q: Tensor) -> np.ndarray:
    """Rows (N, bytes): per block of 32 an fp16 scale, then its bytes; scale (N, K / 32)."""
    head = scale.half().view(torch.uint8).view(*scale.shape, 2)
    return torch.cat((head, q.view(*scale.shape, -1)), -1).flatten(1).contiguous().numpy()


def stored(module: Any, order=lambda rows: rows):
    """(array, GGUF's type) of a linear layer or a table, its rows in another order.

    module  nn's own, or any that has ``weight`` and ``scale``, or ``packed``, as ours have
    """
    from gguf import GGMLQuantizationType as Type

    if hasattr(module, "packed"):
        from kernels.int4_linear.reference import unpack

        n, groups = module.out_features, module.scale.shape[1]
        q = order(unpack(module.packed)[:n]).view(n, groups, 2, BLOCK // 2) + 8
        scale = order(module.scale.permute(0, 2, 1).reshape(-1, groups)[:n])
        nibbles = (q[:, :, 0] | q[:, :, 1] << 4).to(torch.uint8)
        return _blocks(scale, nibbles), Type.Q4_0
    weight = order(module.weight.detach())
    if weight.dtype == torch.int8:
        scale = order(module.scale.reshape(-1, 1)).expand(-1, weight.shape[1] // BLOCK)
        return _blocks(scale.contiguous(), weight.view(torch.uint8)), Type.Q8_0
    if weight.dtype == torch.bfloat16:
        return weight.contiguous().view(torch.uint8).numpy(), Type.BF16
    return weight.float().contiguous().numpy(), Type.F32


LAYER = {"attention.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "attention.v_proj": "attn_v"}  # fmt: skip


def write(model: LeanDecoder, path: Path, rope_base: float) -> None:
    """``model`` (dense, no biases, no norms of queries) as a GGUF file of type llama."""
    from gguf import GGUFWriter

    c, file = model.config, GGUFWriter(path, "llama")
    file.add_block_count(c.num_layers)
    file.add_context_length(c.max_positions)
    file.add_embedding_length(c.hidden_size)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_head_count(c.num_heads)
    file.add_head_count_kv(c.num_kv_heads)
    file.add_layer_norm_rms_eps(c.norm_eps)
    file.add_rope_dimension_count(c.head_dim)
    file.add_rope_freq_base(rope_base)
    file.add_vocab_size(c.vocab_size)
    file.add_tokenizer_model("no_vocab")

    def add(name: str, module: nn.Module, order=lambda rows: rows) -> None:
        array, kind = stored(module, order)
        file.add_tensor(f"{name}.weight", array, raw_dtype=kind)

    def norm(name: str, module: RMSNorm) -> None:
        file.add_tensor(f"{name}.weight", module.weight.detach().float().numpy())

    def turned(rows: Tensor) -> Tensor:
        return interleaved(rows, c.head_dim)

    add("token_embd", model.embed)
    add("output", model.lm_head)
    norm("output_norm", model.norm)
    for i, layer in enumerate(model.layers):
        norm(f"blk.{i}.attn_norm", layer.input_norm)
        norm(f"blk.{i}.ffn_norm", layer.post_norm)
        add(f"blk.{i}.attn_q", layer.attention.q_proj, turned)
        add(f"blk.{i}.attn_k", layer.attention.k_proj, turned)
        for ours, theirs in LAYER.items():
            add(f"blk.{i}.{theirs}", layer.get_submodule(ours))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


# ---- the peer ----------------------------------------------------------------------------


class Llama:
    """One sequence in llama.cpp: ``logits(tokens, start)`` forgets what stood from ``start`` on.

    The weights are read into memory of its own, not mapped, so that it may rearrange them.
    """

    def __init__(self, path: Path, slots: int, threads: int):
        import llama_cpp

        self.lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.use_mmap, how.n_gpu_layers = False, 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        assert self.model, f"llama.cpp cannot read {path.name}"
        room = llama_cpp.llama_context_default_params()
        room.n_ctx = room.n_batch = slots
        room.n_threads = room.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, room)
        assert self.context, "llama.cpp made no context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def logits(self, tokens: list[int], start: int) -> Tensor:
        """Logits (1, 1, V) fp32 after ``tokens`` at positions ``start`` on."""
        self.lib.llama_memory_seq_rm(self.memory, 0, start, -1)
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(tokens)))
        assert status == 0, f"llama_decode returned {status}"
        row = self.lib.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(row, (self.vocab,)).copy())[None, None]

    def close(self) -> None:
        """Free what it holds."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
