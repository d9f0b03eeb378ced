"""The methods that ``fot compare`` knows, by name: what each is, and where it comes from. Light to import."""

from dataclasses import dataclass

TASKS = ("passkey", "perplexity", "needles", "fluency")

# How a method attends, as far as its cost goes: to the whole text, to a window of it, to a memory, or to what it finds.
WHOLE, WINDOW, MEMORY, PASSAGES = "whole", "window", "memory", "passages"


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as it is asked for.
        about: what it is, in one line.
        source: paper or repository.
        wants_tuning: whether its authors train the model for it. Here it is read as it is.
        attends: one of ``WHOLE``, ``WINDOW``, ``MEMORY``, ``PASSAGES``.
        tasks: that it can do.
    """

    name: str
    about: str
    source: str
    wants_tuning: bool = False
    attends: str = WHOLE
    tasks: tuple[str, ...] = TASKS


METHODS = (
    Method("plain", "the model as it is, on the whole text", "RoFormer, arXiv 2104.09864"),
    Method("window", "attention to the last tokens alone", "Longformer, arXiv 2004.05150", attends=WINDOW),
    Method("streaming", "the first tokens and the last ones, positions in the cache", "StreamingLLM, arXiv 2309.17453",
           attends=WINDOW),
    Method("interpolation", "positions divided by the factor", "arXiv 2306.15595; SuperHOT, kaiokendev 2023",
           wants_tuning=True),
    Method("ntk", "a larger base, set once", "NTK-aware scaling, bloc97 2023"),
    Method("dynamic-ntk", "a base that grows with the text; keys are turned anew", "emozilla 2023; arXiv 2309.00071"),
    Method("ntk-by-parts", "low frequencies interpolated, middle ones by NTK", "bloc97 2023; jquesnelle/yarn"),
    Method("yarn", "low frequencies interpolated, attention sharpened", "YaRN, arXiv 2309.00071", wants_tuning=True),
    Method("dynamic-yarn", "YaRN by the length of the text so far; keys are turned anew", "arXiv 2309.00071, B.3"),
    Method("longrope", "a factor for each frequency, given, searched for or YaRN's", "LongRoPE, arXiv 2402.13753",
           wants_tuning=True),
    Method("llama3", "low frequencies interpolated, by wavelength", "Llama 3.1, arXiv 2407.21783", wants_tuning=True),
    Method("giraffe-power", "low frequencies lowered by a power of their place", "Giraffe, arXiv 2308.10882",
           wants_tuning=True),
    Method("giraffe-truncated", "lowest frequencies replaced by one, or by none", "Giraffe, arXiv 2308.10882",
           wants_tuning=True),
    Method("self-extend", "far keys share the positions of their group", "SelfExtend, arXiv 2401.01325"),
    Method("log-n", "queries grow with the logarithm of their position", "Su 2021; Qwen, arXiv 2309.16609"),
    Method("log-n-ntk", "log-n with the base of ntk", "Su 2021; Qwen, arXiv 2309.16609"),
    Method("ssmax", "queries times s ln n", "Scalable-Softmax, arXiv 2501.19399", wants_tuning=True),
    Method("drope", "no positions", "DroPE, arXiv 2512.12167", wants_tuning=True),
    Method("cache-fp8", "plain, keys and values kept in 8 bits", "transformers, QuantizedCache"),
    Method("cache-int4", "plain, keys and values kept in 4 bits", "KIVI, arXiv 2402.02750; transformers"),
    Method("cache-offloaded", "plain, keys and values kept off the GPU", "transformers, DynamicCache"),
    Method("memory", "kNN memory in a few layers, every pair read", "Focused Transformer, arXiv 2307.03170",
           attends=MEMORY),
    Method("memory-ivf", "kNN memory, pairs found by FAISS IVF", "Focused Transformer; FAISS, arXiv 2401.08281",
           attends=MEMORY),
    Method("memory-clusters", "kNN memory, pairs found by clusters, the tail estimated", "Focused Transformer; here",
           attends=MEMORY),
    Method("bm25", "passages with the question's words, read again", "BM25, Robertson 1994", attends=PASSAGES,
           tasks=("passkey", "needles")),
)  # fmt: skip

# What the command compares if nothing is said: one method of each sort.
DEFAULT = ("plain", "streaming", "yarn", "memory", "bm25")


def find_methods(text: str) -> list[Method]:
    """Methods by their names, with commas between, or ``all``.

    Raises:
        ValueError: a name that none has.
    """
    if text == "all":
        return list(METHODS)
    known = {method.name: method for method in METHODS}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no method: choose from {', '.join(known)}, or all")
    return [known[name] for name in dict.fromkeys(names)]
