"""Greedy generation of one answer, whatever form a checkpoint's own generation settings ask for."""

from typing import Any

from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

# Logits of tokens that an answer has already are divided by this (multiplied, if negative; CTRL, arXiv 1909.05858).
REPETITION_PENALTY = 1.1

_ONE_GREEDY_SEQUENCE: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": None,
    "diversity_penalty": None,
    "num_return_sequences": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "token_healing": None,  # it would rewrite the prompt
    # The memory's cache is not of a kind that transformers makes, and takes a prompt whole.
    "use_cache": True,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    # Ids alone come back.
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


def one_greedy_answer(model: Any) -> dict[str, Any]:
    """Arguments of ``generate``. What else a checkpoint asks for (penalties, stop strings, ...) holds."""
    known = model.generation_config
    settings = {name: value for name, value in _ONE_GREEDY_SEQUENCE.items() if hasattr(known, name)}
    if known.pad_token_id is None:  # transformers would say which it takes, at every call
        settings["pad_token_id"] = next(iter(end_tokens(model)), None)
    return settings | {"tokenizer": model.tokenizer}  # stop strings need it


def without_repetition(model: Any, prompt_length: int) -> list[LogitsProcessor]:
    """What holds off loops in ``generate``; nothing if the checkpoint has settings of its own for that.

    Only the answer's own tokens count: what the prompt says may be said once more, for it may hold the answer.

    Args:
        model: that answers.
        prompt_length: tokens of the prompt.
    """
    known = model.generation_config
    if known.repetition_penalty not in (None, 1.0) or known.no_repeat_ngram_size:
        return []
    return [RepetitionPenaltyLogitsProcessor(REPETITION_PENALTY, prompt_ignore_length=prompt_length)]


# Settings that count tokens or look at all of them, so padding or a fresh call of ``generate`` would change what they
# do; with the values that do nothing.
_BY_PLACE: dict[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "max_time": None,
    "watermarking_config": None,
}


def alike_padded(model: Any) -> bool:
    """Whether, by the checkpoint's settings, a prompt's answer is the same behind padding, and in parts."""
    known = model.generation_config
    return all(getattr(known, name, None) in (None, nothing) for name, nothing in _BY_PLACE.items())


def end_tokens(model: Any) -> list[int]:
    """Ids that end an answer, by the checkpoint and by its tokenizer; empty if there are none."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [token for token in {*ends, getattr(model.tokenizer, "eos_token_id", None)} if token is not None]
