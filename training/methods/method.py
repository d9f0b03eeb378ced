"""What a training method changes of a run; the rest of the training room does not know one method from another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fot.compare.rope import check_rotary, rotate
from fot.config import MemoryConfig
from training.batches import Batch
from training.crossbatch import Crossbatch


@dataclass(frozen=True)
class Method:
    """One way to train a model for long texts.

    Attributes:
        name: as ``method`` of a recipe.
        whole: each row of a batch is a sequence of ``length`` tokens of one document, and no layer has a memory.
            Otherwise rows are windows, and memory layers see other windows.
        rope: (model, factor) -> ``rope_parameters`` of its configuration; None: positions stay as they are.
        attention: implementation, registered with transformers, that all layers have; None: the model's.
        prepare: (model, resolved memory settings) -> None: adds the method's own parameters; None: it has none.
        rows: (batch, model) -> the batch as the model sees it; None: as it is.
        switch: what memory layers are handed in training.
        settings: (trained parameters, resolved memory settings) -> settings of the result that hold what ``prepare``
            added, which is taken out of the parameters; None: nothing is.
        trains: parts of names of parameters that are trained besides a LoRA.
    """

    name: str
    whole: bool = True
    rope: Callable[[Any, float], dict[str, Any]] | None = None
    attention: str | None = None
    prepare: Callable[[Any, MemoryConfig], None] | None = None
    rows: Callable[[Batch, Any], Batch] | None = None
    switch: type[Crossbatch] = Crossbatch
    settings: Callable[[dict[str, Tensor], MemoryConfig], dict[str, Any]] | None = None
    trains: tuple[str, ...] = ()

    def stretch(self, model: Any, factor: float) -> None:
        """Give a plain model the method's positions, for texts ``factor`` times as long, in its configuration, too.

        Raises:
            ValueError: the model's positions are not plain rotary ones.
        """
        if self.rope is None:
            return
        check_rotary(model)
        rotate(model, self.rope(model, factor))
        model.config.max_position_embeddings = int(factor * model.config.max_position_embeddings)

    def trains_besides(self, parameter: str) -> bool:
        """Whether a parameter of this name is trained besides the LoRA."""
        return any(part in parameter for part in self.trains)
