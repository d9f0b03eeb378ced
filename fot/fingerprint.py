"""Short names for the weights, the settings and the tokenizer that a memory depends on.

A name of today is ``2:`` and 16 hexadecimal digits. It is a hash, and so differs where rounding differs: a memory also
carries what it was made of (``metadata["made_with"]``), which says whether a model is the same in another dtype, and if
not, what differs. Memories of before have a name without a version.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fot.config import MemoryConfig
from fot.families import decoder_of, key_value_shape, whole_layers
from fot.rotary import rotary_of
from fot.weights import sample_weights

VERSION = 2

# Where a memory's metadata says what it was made with.
MADE_WITH = "made_with"

# Settings of MemoryConfig that change what is stored.
_SETTINGS = ("mem_layers", "local_context", "mem_positionals", "isolated_windows")
_LATER_SETTINGS = ("window_overlap", "full_weight_tokens")
# Fields of a model's configuration that do and that no weight's shape shows.
_CONFIG_FIELDS = ("num_attention_heads", "rms_norm_eps", "hidden_act")
_LATER_FIELDS = (
    *("layer_norm_eps", "hidden_activation", "use_parallel_residual", "query_pre_attn_scalar"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
    *("num_experts_per_tok", "swiglu_alpha", "swiglu_limit"),
)
# Those of families that came later, only where a model has them: names of others' memories stay as they are.
_OWN_FIELDS = ("layer_norm_epsilon", "activation", "use_qk_norm")
# Memories of before say nothing of these: they are read whatever they are.
_LATER = {*_LATER_SETTINGS, *_LATER_FIELDS, "newest_full_weight", "sliding_layers", "unrotated_layers"}

# Significant bits of a number. Twice rounded, first to float16, a bfloat16 number may be off by a little more than
# half its last place.
_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
_HALF_PLACE = {"bfloat16": 9 / 16, "float16": 1 / 2, "float32": 1 / 2}
# The smallest step of float16, for numbers near 0.
_SMALLEST_STEP = 2.0**-24


@dataclass(frozen=True)
class Fingerprint:
    """What decides the keys and values that a model stores, up to those of its last memory layer.

    Attributes:
        settings: of the memory, by name.
        config: of the model, by name.
        weights: digest of names, shapes and quantised codes of the weights.
        values: samples of the others, each (n,) float32, by name.
    """

    settings: dict[str, Any]
    config: dict[str, Any]
    weights: str
    values: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any) -> "Fingerprint":
        """Of a ``FoTForCausalLM``. Looks at the weights anew each time: some ways to change them leave no trace.

        Raises:
            ValueError: the weights are not loaded.
        """
        config = model.memory_config
        samples = sample_weights(decoder_of(model), max(config.layers, default=-1))
        return cls(_settings(config), _computation(model), samples.digest, samples.values)

    @property
    def name(self) -> str:
        """``2:`` and 16 hexadecimal digits; the same for a model in float32 and in bfloat16."""
        return self._named(self.settings, self.config)

    @property
    def name_of_before(self) -> str:
        """What ``name`` was before it knew of ``window_overlap`` and some others."""
        return self._named(
            *({name: one for name, one in part.items() if name not in _LATER} for part in (self.settings, self.config))
        )

    def _named(self, settings: dict[str, Any], config: dict[str, Any]) -> str:
        digest = hashlib.sha256(json.dumps([settings, config, self.weights], sort_keys=True).encode())
        digest.update(self._together().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        return f"{VERSION}:{digest.hexdigest()[:16]}"

    def to_dict(self) -> dict[str, Any]:
        """For a memory's metadata."""
        samples = base64.b64encode(self._together().numpy().astype("<f4").tobytes()).decode()
        return {"settings": self.settings, "config": self.config, "weights": self.weights, "samples": samples}

    def difference(self, other: Any) -> str | None:
        """What is different in the model that a memory was made with.

        Args:
            other: what ``to_dict`` gave then, or anything else.

        Returns:
            "" if the model is the same, perhaps in another dtype; a setting, as "local_context=64, not 32"; None if
            the weights differ, or ``other`` does not say.
        """
        if not isinstance(other, dict):
            return None
        for ours, theirs in ((self.settings, other.get("settings")), (self.config, other.get("config"))):
            if not isinstance(theirs, dict):
                return None
            for name in dict.fromkeys([*ours, *theirs]):  # in our order: some settings matter only with others
                unsaid = name in _LATER and name not in theirs
                if not unsaid and ours.get(name) != theirs.get(name):
                    return f"{name}={theirs.get(name)}, not {ours.get(name)}"
        same = other.get("weights") == self.weights and self._same_values(other.get("samples"))
        return "" if same else None

    def _same_values(self, samples: Any) -> bool:
        try:
            theirs = torch.from_numpy(np.frombuffer(base64.b64decode(samples, validate=True), "<f4").copy())
        except (TypeError, ValueError):
            return False
        lengths = [len(values) for values in self.values.values()]
        if len(theirs) != sum(lengths):
            return False
        return all(map(_same_numbers, self.values.values(), theirs.split(lengths)))

    def _together(self) -> Tensor:
        return torch.cat(list(self.values.values()))


def weights_fingerprint(model: Any) -> str:
    """A name for everything that decides what keys and values a model stores."""
    return Fingerprint.of(model).name


def difference(model: Any, memory: Any) -> str | None:
    """What a memory was made with that this model has not: as ``Fingerprint.difference``."""
    if memory.fingerprint and ":" not in memory.fingerprint:  # of before there were versions
        return "" if memory.fingerprint == first_fingerprint(model) else _named_setting(model, memory)
    ours = Fingerprint.of(model)
    if memory.fingerprint in (ours.name, ours.name_of_before):
        return ""
    if not memory.fingerprint.startswith(f"{VERSION}:"):
        return None
    made_with = memory.metadata.get(MADE_WITH)
    return ours.difference(made_with) if made_with else _named_setting(model, memory)


def _named_setting(model: Any, memory: Any) -> str | None:
    """A setting that differs, by those that ``fot memory build`` notes."""
    try:
        theirs = MemoryConfig.from_dict(memory.metadata["memory"])
    except (KeyError, TypeError, ValueError):
        return None
    others = _settings(theirs)
    for name, ours in _settings(model.memory_config).items():
        if None not in (ours, others.get(name)) and ours != others[name]:
            return f"{name}={others[name]}, not {ours}"
    return None


def _settings(config: MemoryConfig) -> dict[str, Any]:
    found = {name: _plain(getattr(config, name)) for name in (*_SETTINGS, *_LATER_SETTINGS)}
    if config.isolated_windows:  # what is stored has read no memory, and so does not depend on what one weighs
        found["full_weight_tokens"] = None
        return found
    # What does not count is not said, as in memories of before.
    if config.full_weight_tokens:
        found["newest_full_weight"] = _plain(config.newest_full_weight)
    if config.memory_gates is not None:
        found["memory_gates"] = _plain(config.memory_gates)
    return found


def _computation(model: Any) -> dict[str, Any]:
    config, last = model.config, max(model.memory_config.layers, default=-1)
    found = {name: _plain(getattr(config, name, None)) for name in (*_CONFIG_FIELDS, *_LATER_FIELDS)}
    found |= {name: _plain(getattr(config, name)) for name in _OWN_FIELDS if hasattr(config, name)}
    whole = whole_layers(config, model.memory_config.window)
    shorter = [layer for layer in range(last) if layer not in whole]
    sliding = getattr(config, "sliding_window", None)
    found["sliding_layers"] = [sliding, shorter] if shorter and sliding else None
    frequencies = rotary_of(model).frequencies[: last + 1]
    found["unrotated_layers"] = [layer for layer, frequency in enumerate(frequencies) if frequency is None]
    rope = dict(getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)})
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):  # others look at it
        rope["max_position_embeddings"] = config.max_position_embeddings
    found["head_dim"] = _plain(key_value_shape(model)[1])
    found["rope_parameters"] = {name: _plain(value) for name, value in sorted(rope.items()) if value is not None}
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back; numbers as formats of less precision keep them, so that 1e-5 is 1e-5 of a GGUF file."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, float):
        value = float(f"{value:.6g}")
        return int(value) if value.is_integer() else value
    return value


def _same_numbers(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two lots of float32 numbers can be the same numbers, each lot rounded to a dtype of its own."""
    apart = (ours - theirs).abs()
    ours_in, theirs_in = _rounded_to(ours), _rounded_to(theirs)
    if ours_in == theirs_in:
        return bool((apart <= _SMALLEST_STEP).all())
    error = _rounding_error(ours, ours_in) + _rounding_error(theirs, theirs_in)
    return bool((apart < error.clamp(min=_SMALLEST_STEP)).all())


def _rounded_to(values: Tensor) -> str:
    """The smallest of three dtypes that holds these float32 numbers."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            return str(dtype).removeprefix("torch.")
    return "float32"


def _rounding_error(values: Tensor, dtype: str) -> Tensor:
    """The most by which rounding to a dtype can have changed these numbers."""
    place = torch.ldexp(torch.ones_like(values), values.frexp().exponent - _BITS[dtype])  # of the last bit
    if dtype == "float16":
        place = place.clamp(min=_SMALLEST_STEP)
    return place * _HALF_PLACE[dtype]


def first_fingerprint(model: Any) -> str:
    """The name of before there were versions, for memories that have one.

    It knows the embedding, every layer up to the last memory layer, and the settings of windows and positions, by 1,024
    numbers of each parameter in bfloat16. It does not know what PEFT's adapters do, what accelerate keeps elsewhere,
    or how positions are turned.

    Returns:
        16 hexadecimal digits.
    """
    config = model.memory_config
    digest = hashlib.sha256(
        repr((config.layers, config.local_context, config.mem_positionals, config.isolated_windows)).encode()
    )
    last = max(config.layers, default=-1)
    for name, parameter in sorted(decoder_of(model).named_parameters()):
        parts = name.split(".")
        if parts[0] == "layers" and int(parts[1]) > last:
            continue
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)][:1024]
        bits = (
            sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes() if flat.device.type != "meta" else b""
        )
        digest.update(name.encode() + bits)
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
