"""Short names for the weights and the tokenizer that a memory depends on."""

import hashlib
import json
from typing import Any

import torch

# Numbers looked at in each parameter: enough to tell fine-tuned weights apart, cheap for a 7B model.
SAMPLES = 1024


def weights_fingerprint(model: Any) -> str:
    """Hash of everything that decides what keys and values the model stores.

    Covers the embedding, every layer up to the last memory layer, and the settings of windows and positions.
    Samples are rounded to bfloat16 first, so a model loaded in float32 and in bfloat16 has one fingerprint.

    Returns:
        16 hexadecimal digits.
    """
    parameters = dict(model.model.named_parameters())
    # In-place updates (training) raise a tensor's version; moved or replaced tensors change its id.
    state = (model.memory_config, tuple((id(p), p._version) for p in parameters.values()))
    cached = model.__dict__.get("_fingerprint")
    if cached is not None and cached[0] == state:
        return cached[1]
    config = model.memory_config
    digest = hashlib.sha256(
        repr((config.layers, config.local_context, config.mem_positionals, config.isolated_windows)).encode()
    )
    last = max(config.layers, default=-1)
    for name, parameter in sorted(parameters.items()):
        parts = name.split(".")
        if parts[0] == "layers" and int(parts[1]) > last:
            continue
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        bits = (
            sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes() if flat.device.type != "meta" else b""
        )
        digest.update(name.encode() + bits)
    model.__dict__["_fingerprint"] = (state, digest.hexdigest()[:16])
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of how a tokenizer turns text into ids: vocabulary, merges, normaliser; of a slow one the vocabulary alone.

    Returns:
        16 hexadecimal digits.
    """
    cached = tokenizer.__dict__.get("_fot_fingerprint")
    if cached is not None and cached[0] == len(tokenizer):
        return cached[1]
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Every call with truncation= or padding= changes these.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = tokenizer.get_vocab()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    tokenizer.__dict__["_fot_fingerprint"] = (len(tokenizer), digest)
    return digest
