"""What the entries of a recipe may be, by pydantic; and its complaints in words: the key, the value, the remedy."""

import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    create_model,
)
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypedDict

from fot.config import MemoryConfig
from training.schedule import ContextSchedule
from training.sources import DataSource

# Infinity and NaN are never meant; a key that nobody reads is a mistake.
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(ge=1, le=1000)]
Rate = Annotated[float, Field(gt=0, le=1000)]
Share = Annotated[float, Field(ge=0, le=1)]
AboveZeroShare = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class As:
    """Checks a mapping as the arguments of a dataclass, its own checks included, or as a ``TypedDict``.

    It stays a mapping of the keys that are given, with numbers and lists for what could be read as such: to YAML, 2e-5
    without a point is a text.
    """

    def __init__(self, kind: Any, example: str = "") -> None:
        self.kind = kind
        self.example = example

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Of pydantic's protocol for annotations."""
        inner = handler.generate_schema(self.kind)

        def check(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> dict[str, Any]:
            if not isinstance(value, dict):  # pydantic would also take an instance
                raise ValueError(f"it must be a mapping{self.example}")
            checked = validate(value)
            found = checked if isinstance(checked, dict) else {key: getattr(checked, key) for key in value}
            no_true_for_one(value, found)
            return found

        return core_schema.no_info_wrap_validator_function(check, inner)


def no_true_for_one(given: dict[str, Any], checked: dict[str, Any]) -> None:
    """Refuse true and false as numbers, which they are to Python.

    Raises:
        ValueError: names the key.
    """
    for key, value in given.items():
        if isinstance(value, bool) and isinstance(checked[key], int | float) and not isinstance(checked[key], bool):
            kind = "whole number" if isinstance(checked[key], int) else "number"
            raise ValueError(f"{key} is {value}; it must be a {kind}")


Source = Annotated[dict[str, Any], As(DataSource, " such as {path: books/*.txt}")]


class DictionaryEntry(TypedDict, total=False):
    """Settings of ``DictionaryTask``."""

    kind: Literal["dictionary"]
    weight: AboveZero
    windows: Positive
    window: Positive
    fewest_records: Positive | None
    similar: Share
    name: str


class RetrievalEntry(TypedDict, total=False):
    """Settings of ``SyntheticRetrieval``; ``filler`` are sources of real text."""

    kind: Literal["retrieval"]
    filler: Annotated[list[Source], Field(min_length=1)]
    weight: AboveZero
    windows: Positive
    window: Positive
    facts: tuple[Positive, Positive]
    text_weight: NotNegative
    text_share: Share
    near_share: Share
    again_share: Share
    distractor_share: Share
    chat_share: Share
    name: str


class QuestionsEntry(TypedDict, total=False):
    """Settings of ``PassageQuestions``; ``path`` is a file of ``training.asked``, ``filler`` as of ``retrieval``."""

    kind: Literal["questions"]
    path: str
    filler: Annotated[list[Source], Field(min_length=1)]
    weight: AboveZero
    windows: Positive
    window: Positive
    passages: tuple[Positive, Positive]
    text_weight: NotNegative
    text_share: Share
    near_share: Share
    name: str


class LoraEntry(TypedDict, total=False):
    """Settings of ``peft.LoraConfig``."""

    r: Positive
    lora_alpha: AboveZero
    lora_dropout: Decay
    target_modules: list[str] | str
    layers_to_transform: list[Natural] | Natural
    modules_to_save: list[str]
    bias: Literal["none", "all", "lora_only"]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str
    rank_pattern: dict[str, Positive]
    alpha_pattern: dict[str, AboveZero]


def _known_task(value: Any) -> Any:
    kinds = ("retrieval", "dictionary", "questions")
    if "kind" not in value:
        raise ValueError(f"it has no kind: add kind: {' or kind: '.join(kinds)}")
    if value["kind"] not in kinds:
        raise ValueError(f"kind is {value['kind']!r}; choose {' or '.join(kinds)}")
    if value["kind"] != "dictionary" and "filler" not in value:
        hidden = "facts" if value["kind"] == "retrieval" else "passages"
        raise ValueError(f"it has no filler, the text that {hidden} are hidden in: add filler: [{{path: books/*.txt}}]")
    if value["kind"] == "questions" and "path" not in value:
        raise ValueError("it has no path, the file with passages and questions: add path: fairytales.jsonl")
    return value


_TaskOfKind = Annotated[DictionaryEntry | RetrievalEntry | QuestionsEntry, Field(discriminator="kind")]
_AnyTask = Annotated[_TaskOfKind, BeforeValidator(_known_task)]
TaskEntry = Annotated[dict[str, Any], As(_AnyTask, " such as {kind: dictionary}")]
Memory = Annotated[dict[str, Any], As(MemoryConfig)]
Contexts = Annotated[dict[str, Any], As(ContextSchedule)]
Lora = Annotated[dict[str, Any], As(LoraEntry)]
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb"]


def validator(recipe: type) -> type[BaseModel]:
    """A pydantic model of a dataclass's annotations."""
    hints = get_type_hints(recipe, include_extras=True)
    entries: Any = {f.name: (hints[f.name], ...) for f in fields(recipe)}
    return create_model("RecipeSchema", __config__=CONFIG, **entries)


def complaint(error: ValidationError, known: Iterable[str]) -> str:
    """The first thing that pydantic found wrong, as a line.

    Args:
        error: what it raised.
        known: the keys of a recipe.
    """
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    # A misspelt key is also a missing one; the key that is there says more.
    first = min(error.errors(include_url=False), key=lambda found: found["type"] not in unknown)
    kind, parts, value, context = first["type"], first["loc"], first["input"], first.get("ctx", {})
    place = _place(parts)
    if kind in unknown:
        names = sorted(_keys(parts[:-1])) or sorted(known)
        return f"recipe: {place} is {_shown(value)}; unknown entry {parts[-1]!r}; known: {', '.join(names)}"
    if kind in ("missing", "missing_argument"):
        outer = f"recipe: {_place(parts[:-1])} is {_shown(value)}"
        return f"{outer}; it has too few entries" if isinstance(parts[-1], int) else f"{outer}; add {parts[-1]}"
    if kind == "value_error":
        said = str(context["error"]).removeprefix(f"{place}: ")
        return f"recipe: {place} is {_shown(value)}; {said}" if said.startswith("it ") else f"recipe: {place}: {said}"
    return f"recipe: {place} is {_shown(value)}; {_remedy(kind, context, first['msg'], place)}"


def _remedy(kind: str, context: dict[str, Any], message: str, place: str) -> str:
    if kind == "literal_error":
        return f"choose one of {context['expected']}".replace("'", "").replace(" or ", ", ")
    bounds = {"greater_than": "above {gt}", "greater_than_equal": "at least {ge}", "less_than": "below {lt}",
              "less_than_equal": "at most {le}"}  # fmt: skip
    if kind in bounds:
        return f"it must be {bounds[kind].format(**{key: f'{value:g}' for key, value in context.items()})}"
    if kind.startswith(("int_", "int")):
        return "it must be a whole number"
    if kind.startswith(("float", "finite_number")):
        return "it must be a number"
    if kind.startswith("bool"):
        return "it must be true or false"
    if kind.startswith("string"):
        return "it must be a text"
    if kind in ("too_short", "too_long"):
        return f"it must have {'at least' if kind == 'too_short' else 'at most'} {_count(context)}"
    if kind in ("list_type", "tuple_type", "sequence_str") or (
        kind == "is_instance_of" and context["class"] == "Sequence"
    ):
        example = (
            " of mappings such as [{path: books/*.txt}]" if re.search(r"(sources|held_out|filler)$", place) else ""
        )
        return f"it must be a list{example}"
    if kind in ("dict_type", "model_type", "dataclass_type", "mapping_type"):
        return "it must be a mapping"
    return message[:1].lower() + message[1:]


def _count(context: dict[str, Any]) -> str:
    number = context.get("min_length", context.get("max_length"))
    return f"{number} {'entry' if number == 1 else 'entries'}"


def _place(parts: Iterable[int | str]) -> str:
    """A path such as ``tasks[0].filler[1].path``; what pydantic says of the branch of a union is left out."""
    place = ""
    for part in parts:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in _BRANCHES and "[" not in part:
            place += f".{part}" if place else part
    return place


# Names of union members and of wrapped schemas that stand in pydantic's paths.
_BRANCHES = {
    "int", "str", "bool", "retrieval", "questions", "dictionary", "constrained-int", "constrained-float",
    "constrained-str",
}  # fmt: skip


def _keys(parts: tuple[int | str, ...]) -> list[str]:
    """Keys of the mapping at a path of a recipe; none for the recipe itself."""
    names = [part for part in parts if isinstance(part, str)]
    kinds: dict[str, Any] = {
        "memory": MemoryConfig, "contexts": ContextSchedule, "lora": LoraEntry, "filler": DataSource,
        "sources": DataSource, "held_out": DataSource, "retrieval": RetrievalEntry, "dictionary": DictionaryEntry,
        "questions": QuestionsEntry,
    }  # fmt: skip
    if not names:
        return []
    kind = kinds.get(names[-1])
    if is_dataclass(kind):
        return [f.name for f in fields(kind)]
    return list(getattr(kind, "__annotations__", ()))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
