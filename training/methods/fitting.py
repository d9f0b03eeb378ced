"""Which entries of a recipe fit its method."""

from typing import Any

from training.methods import METHODS
from training.methods.longlora import bounds


def check_method(recipe: Any) -> None:
    """Refuse entries that the method of a recipe would not use, or that it cannot do without.

    Args:
        recipe: a ``training.recipe.Recipe``.

    Raises:
        ValueError: names the entry, its value and a remedy.
    """
    method = METHODS[recipe.method]
    if recipe.focus:
        _check_focus(recipe)
    said = f"but method is {recipe.method!r}, which"
    if not method.whole:
        for name, value, unused in (("length", recipe.length, None), ("factor", recipe.factor, 1)):
            if value != unused:
                raise ValueError(f"recipe: {name} is {value}, {said} reads windows: omit {name}")
        if recipe.method == "memorizing":
            _check_memorizing(recipe, said)
        return
    for name in ("memory", "contexts", "held_out_memory", "tasks"):
        if value := getattr(recipe, name):
            raise ValueError(f"recipe: {name} is {value!r:.60}, {said} trains on whole sequences of text: omit {name}")
    if recipe.length is None:
        raise ValueError(f"recipe: length is not given, {said} reads whole sequences: set length, such as 4096 tokens")
    if recipe.windows != 1:
        raise ValueError(f"recipe: windows is {recipe.windows}, {said} reads a sequence as one: set windows: 1")
    if recipe.trainable not in ("all", "lora"):
        raise ValueError(f"recipe: trainable is {recipe.trainable!r}, {said} has no memory layers: set trainable: lora")
    if method.rope is None and recipe.factor != 1:
        raise ValueError(f"recipe: factor is {recipe.factor:g}, {said} leaves positions as they are: omit factor")
    if recipe.method == "longlora" and recipe.trainable != "lora":
        raise ValueError(f"recipe: trainable is {recipe.trainable!r}, {said} trains a LoRA: set trainable: lora")
    if recipe.method == "longlora":
        bounds(recipe.length)


def _check_focus(recipe: Any) -> None:
    if recipe.method != "crossbatch":
        raise ValueError(
            f"recipe: focus is {recipe.focus:g}, but method is {recipe.method!r}, which shows no windows of other "
            "documents: omit focus, or set method: crossbatch"
        )
    if not recipe.schedule().mixes(recipe.windows):
        raise ValueError(
            f"recipe: focus is {recipe.focus:g}, but with windows {recipe.windows} and contexts "
            f"{recipe.contexts!r:.80} no window sees both earlier windows of its document and windows of others: set "
            "windows and contexts.values to at least 2, or omit focus"
        )


def _check_memorizing(recipe: Any, said: str) -> None:
    if recipe.memory.get("top_k") is None:
        raise ValueError(f"recipe: memory.top_k is not given, {said} reads the nearest keys: set it, such as 32")
    if "memory_gates" in recipe.memory:
        raise ValueError(f"recipe: memory.memory_gates is given, {said} learns its gates: omit memory_gates")
    unused = sorted(set(recipe.contexts) - {"previous_windows"})
    if unused:
        raise ValueError(
            f"recipe: contexts.{unused[0]} is {recipe.contexts[unused[0]]!r}, {said} sees earlier windows of its own "
            f"document alone: omit {unused[0]}"
        )
