"""The peers of ``peers.py``, by name: each opens a checkpoint folder and reads texts into what it keeps of them.

Some run under an interpreter or packages of their own. So nothing but NumPy is imported before a peer is opened.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

PASSKEY, PERPLEXITY = "passkey", "perplexity"
# Tokens that go through at once where a text is read in pieces on a CPU. A GPU takes a text as a whole.
CHUNK = 512


@dataclass(frozen=True)
class Job:
    """What a peer is opened for.

    Attributes:
        folder: checkpoint of a Llama with memory settings; a tokenizer lies there unless it is a random model.
        device: ``cpu`` or ``cuda``.
        dtype: of weights and caches, by its name in torch.
        threads: of the CPU.
        longest: most tokens that will be held at once.
        gguf: weights of llama.cpp.
        scratch: folder for files of the peer.
    """

    folder: str
    device: str
    dtype: str
    threads: int
    longest: int
    gguf: str | None
    scratch: str


class Reader(Protocol):
    """One peer with its model.

    Attributes:
        note: what its row must say of this machine.
    """

    note: str

    def read(self, ids: Sequence[int]) -> None:
        """Forget the last text and read this one, to the end: nothing is left to be done on the device."""

    def feed(self, ids: Sequence[int], keep: int) -> np.ndarray:
        """Read on, at most ``CHUNK`` tokens: logits (keep, V) after the last ``keep`` of them, float32."""

    def held_bytes(self) -> int:
        """Bytes kept of what was read."""


def finish(job: Job) -> None:
    """Wait for the device."""
    if job.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _array(logits: Any) -> np.ndarray:
    return logits.float().cpu().numpy()


def _ids(job: Job, ids: Sequence[int]) -> Any:
    import torch

    return torch.tensor([list(ids)], device=job.device)


class Compared:
    """A method of ``fot compare`` by its name, or fot's memory with other settings."""

    def __init__(self, job: Job, method: str = "", settings: dict[str, Any] | None = None) -> None:
        import torch

        import fot
        from fot.compare import readers
        from fot.compare.methods import Setting, opened

        self.note = _quanto_without_compiler(job) if method == "cache-int4" else ""
        if job.device == "cuda":
            readers.CHUNK = max(readers.CHUNK, job.longest)
        model: Any = fot.FoTForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.dtype))
        model = model.to(job.device).eval()
        if settings is None:
            self.reader = ExitStack().enter_context(opened(method, model, Setting(longest=job.longest)))
        else:
            self.reader = readers.MemoryReader(fot.attach_memory(model, replace(model.memory_config, **settings)))
        self.job, self.state = job, None

    def read(self, ids: Sequence[int]) -> None:
        self.state = None
        self.state = self.reader.read(ids, lambda tokens: None)
        finish(self.job)

    def feed(self, ids: Sequence[int], keep: int) -> np.ndarray:
        return _array(self.reader.feed(self.state, ids, keep))

    def held_bytes(self) -> int:
        return self.reader.held_bytes(self.state)


def _quanto_without_compiler(job: Job) -> str:
    """On a GPU, quanto compiles a kernel that unpacks 4 bits. Without a compiler torch unpacks, and a note says so."""
    if job.device == "cpu" or shutil.which("nvcc"):
        return ""
    from optimum.quanto.library.extensions.cuda import ext
    from optimum.quanto.library.unpack import unpack

    ext._lib = SimpleNamespace(unpack=unpack)
    return "unpacked by torch: no nvcc"


class Pressed:
    """kvpress: a press drops a share of the keys while the text is read, which is one call."""

    def __init__(self, job: Job, press: str, ratio: float) -> None:
        import kvpress
        import torch
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.dtype))
        self.model = self.model.to(job.device).eval()
        self.note = ""
        self.job, self.press, self.cache, self.place = job, getattr(kvpress, press)(ratio), None, 0

    def read(self, ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        self.cache = None
        cache: Any = DynamicCache()
        with self.press(self.model):
            self.model.model(input_ids=_ids(self.job, ids), past_key_values=cache)
        self.cache, self.place = cache, len(ids)
        finish(self.job)

    def feed(self, ids: Sequence[int], keep: int) -> np.ndarray:
        import torch

        places = torch.arange(self.place, self.place + len(ids), device=self.job.device)[None]  # the text's, as a whole
        outputs = self.model(
            _ids(self.job, ids), past_key_values=self.cache, position_ids=places, logits_to_keep=keep
        )  # fmt: skip
        self.place += len(ids)
        return _array(outputs.logits[0])

    def held_bytes(self) -> int:
        assert self.cache is not None
        return sum(part.nbytes for layer in self.cache.layers for part in (layer.keys, layer.values))


class LlamaCpp:
    """llama-cpp-python, all of the text in its context; on a GPU if it was built for one."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        assert job.gguf is not None
        on_gpu = job.device == "cuda" and llama_cpp.llama_supports_gpu_offload()
        self.note = "" if job.device == "cpu" or on_gpu else "built without CUDA: on the CPU"
        self.model = llama_cpp.Llama(
            job.gguf, n_ctx=job.longest, n_batch=CHUNK, n_threads=job.threads, n_threads_batch=job.threads,
            n_gpu_layers=-1 if on_gpu else 0, verbose=False,
            flash_attn=on_gpu,  # on a CPU it took 45 ms a token, and 25 without
        )  # fmt: skip
        if self.model.n_ctx() < job.longest:
            raise ValueError(f"a context of {self.model.n_ctx():,} tokens is the longest that it makes")

    def read(self, ids: Sequence[int]) -> None:
        import llama_cpp

        self.model.reset()
        self.model.eval(ids)
        llama_cpp.llama_synchronize(self.model.ctx)

    def feed(self, ids: Sequence[int], keep: int) -> np.ndarray:
        # ``eval`` gives logits of all tokens of a context or of none, so this is what it does inside.
        model, rows = self.model, len(ids) if keep > 1 else 1
        model._ctx.kv_cache_seq_rm(-1, model.n_tokens, -1)
        model._batch.set_batch(batch=ids, n_past=model.n_tokens, logits_all=keep > 1)
        model._ctx.decode(model._batch)
        model.n_tokens += len(ids)
        logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(rows * model.n_vocab(),))
        return logits.reshape(rows, -1)[-keep:].copy()

    def held_bytes(self) -> int:
        import llama_cpp

        return int(llama_cpp.llama_state_seq_get_size(self.model.ctx, 0))


def _last_logits(head: Any, keep: Callable[[], int]) -> Any:
    """A head that is asked for the last tokens alone: logits of a whole text would not fit."""
    from torch import nn

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Any) -> Any:
            return self.head(hidden[:, -keep() :])

    return Last()


class LongLlama:
    """LongLLaMA's own code. It has no grouped KV heads: each is repeated for its group."""

    def __init__(self, job: Job) -> None:
        import torch
        from safetensors.torch import load_file
        from src.configuration_longllama import LongLlamaConfig
        from src.modeling_longllama import LongLlamaForCausalLM

        shape = json.loads((Path(job.folder) / "config.json").read_text())
        memory, heads = shape["fot_memory"], shape["num_attention_heads"]
        same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "rms_norm_eps", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
        config = LongLlamaConfig(
            **{name: shape[name] for name in same if shape.get(name) is not None},
            rope_theta=(shape.get("rope_parameters") or shape)["rope_theta"],
            max_position_embeddings=memory["local_context"], last_context_length=memory["local_context"] // 2,
            mem_layers=list(memory["mem_layers"]), mem_dtype=job.dtype, torch_attention=True,
        )  # fmt: skip
        weights, group = load_file(Path(job.folder) / "model.safetensors"), heads // shape["num_key_value_heads"]
        for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
            by_head = weights[name].unflatten(0, (heads // group, -1))
            weights[name] = by_head.repeat_interleave(group, dim=0).flatten(0, 1)
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        model: Any = LongLlamaForCausalLM(config)
        model.load_state_dict(weights)
        self.model = model.to(job.device, getattr(torch, job.dtype)).eval()
        self.model.lm_head = _last_logits(self.model.lm_head, lambda: self.keep)
        self.note, self.job, self.keep, self.past = "", job, 1, None

    def read(self, ids: Sequence[int]) -> None:
        self.past = None
        self.feed(ids, 1)

    def feed(self, ids: Sequence[int], keep: int) -> np.ndarray:
        self.keep = keep
        outputs = self.model(_ids(self.job, ids), past_key_values=self.past, use_cache=True)
        self.past = outputs.past_key_values
        return _array(outputs.logits[0])

    def held_bytes(self) -> int:
        assert self.past is not None
        return sum(part.nbytes for layer in self.past for part in layer)


class Memorizing:
    """memorizing-transformers-pytorch of the same shape, which has no trained weights.

    One KV head in memory layers, top-32 by HNSW on the CPU, values in a file; float32, which its files are in.
    """

    def __init__(self, job: Job) -> None:
        from memorizing_transformers_pytorch import MemorizingTransformer

        shape = json.loads((Path(job.folder) / "config.json").read_text())
        heads = shape["num_attention_heads"]
        self.model = MemorizingTransformer(
            num_tokens=shape["vocab_size"], dim=shape["hidden_size"], depth=shape["num_hidden_layers"],
            heads=heads, dim_head=shape["hidden_size"] // heads,
            memorizing_layers=tuple(layer + 1 for layer in shape["fot_memory"]["mem_layers"]),  # it counts from 1
            max_knn_memories=job.longest, knn_memories_directory=job.scratch, xl_max_memories=CHUNK,
        ).eval().to(job.device)  # fmt: skip
        self.model.to_logits = _last_logits(self.model.to_logits, lambda: self.keep)
        self.note, self.job, self.keep, self.memories, self.local = "", job, 1, None, None

    def read(self, ids: Sequence[int]) -> None:
        if self.memories is not None:
            self.memories.cleanup()
        self.memories, self.local = self.model.create_knn_memories(batch_size=1), None
        for start in range(0, len(ids), CHUNK):
            self.feed(ids[start : start + CHUNK], 1)

    def feed(self, ids: Sequence[int], keep: int) -> np.ndarray:
        self.keep = keep
        logits, self.local = self.model(_ids(self.job, ids), knn_memories=self.memories, xl_memories=self.local)
        return _array(logits[0])

    def held_bytes(self) -> int:
        import faiss

        indexes = sum(faiss.serialize_index(memory.knns[0].index).size for memory in self.memories)
        pairs = sum(int(memory.db_offsets[0]) for memory in self.memories)
        return indexes + pairs * 2 * self.model.dim_head * 4


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        open: makes its reader.
        needs: what must be given for it: an option of ``peers.py``, or nothing.
        whole: whether it has the whole text in its context, and so ends with its trained positions.
        tasks: that it can be judged by.
        shapes: of ``peers.py`` that it is measured on.
        note: what its row must say.
        torch: whether it runs on torch.
    """

    open: Callable[[Job], Reader]
    needs: str = ""
    whole: bool = True
    tasks: tuple[str, ...] = (PASSKEY, PERPLEXITY)
    shapes: tuple[str, ...] = ("shipped", "random")
    note: str = ""
    torch: bool = True


def _fot(**settings: Any) -> Peer:
    return Peer(partial(Compared, settings=settings), whole=False)


PEERS: dict[str, Peer] = {
    "fot exact": _fot(index="exact"),
    "fot clusters": _fot(index="clusters"),
    "fot clusters, int8": _fot(index="clusters", key_dtype="int8", value_dtype="int8"),
    "fot IVF": replace(_fot(index="IVF,Flat"), shapes=("random",)),
    "transformers, dynamic cache": Peer(partial(Compared, method="plain")),
    "transformers, offloaded cache": Peer(partial(Compared, method="cache-offloaded")),
    "transformers, fp8 cache": Peer(partial(Compared, method="cache-fp8")),
    "transformers, int4 cache": Peer(partial(Compared, method="cache-int4"), needs="extra"),
    "kvpress SnapKV, half dropped": Peer(partial(Pressed, press="SnapKVPress", ratio=0.5), needs="kvpress"),
    "kvpress ExpectedAttention, half dropped": Peer(
        partial(Pressed, press="ExpectedAttentionPress", ratio=0.5), needs="kvpress"
    ),
    "BM25 and re-reading": Peer(partial(Compared, method="bm25"), whole=False, tasks=(PASSKEY,), shapes=("shipped",)),
    "llama.cpp": Peer(
        LlamaCpp, needs="llama-cpp", shapes=("shipped",), note="the GGUF's weights; peak is RSS", torch=False
    ),
    "LongLLaMA's code": Peer(LongLlama, needs="longllama", whole=False),
    "memorizing-transformers-pytorch": Peer(
        Memorizing, needs="extra", whole=False, tasks=(), note="random weights, float32"
    ),
}


def perplexity(logits: np.ndarray, targets: Sequence[int]) -> float:
    """Of tokens (T,) by the logits (T, V) before each."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    losses = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), list(targets)]
    return math.exp(float(losses.mean()))
