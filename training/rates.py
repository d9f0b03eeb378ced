"""The learning rate of a step: a function of the recipe and the step alone, so that a resumed run has the same."""

import math

from training.recipe import Recipe

# Share of a run's steps that ``warmup_stable_decay`` falls over, unless ``decay_steps`` says.
DECAY_SHARE = 0.1


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate of a step (0, 1, ...): linear warm-up, then the recipe's schedule.

    As the schedules of transformers, but for the first step of the warm-up, which is not 0.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    return recipe.learning_rate * _share(recipe, step)


def _share(recipe: Recipe, step: int) -> float:
    after, rest = step - recipe.warmup_steps, max(1, recipe.steps - recipe.warmup_steps)
    if recipe.lr_schedule == "linear":
        return 1 - after / rest
    if recipe.lr_schedule == "cosine":
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * after / rest))
    if recipe.lr_schedule == "inverse_sqrt":
        return math.sqrt(max(1, recipe.warmup_steps) / max(1, step + 1))
    if recipe.lr_schedule == "warmup_stable_decay":
        falling = recipe.decay_steps or max(1, round(DECAY_SHARE * recipe.steps))
        return min(1.0, (recipe.steps - step) / falling)
    return 1.0
