"""The manifest of a memory's folder: what the memory is, and which files are it."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from memory.vectors import VECTOR_DTYPES

MANIFEST = "manifest.json"
LOCK = "lock"
FORMAT = "fot memory"
# 1 had float32 scales and clusters without coarse ones; 3 is 2 with ``by_cluster``, and written for it alone.
FORMAT_VERSION, PLAIN_VERSION = 3, 2
PART_NAME = re.compile(r"(segment|index)-(\d{6,9})\.safetensors")
MOST_LISTS = 1 << 22  # in an index that a stranger's manifest may ask for

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A safetensors file of the folder.

    Attributes:
        file: its name.
        bytes: its size.
        sha256: of its content, hexadecimal.
        tokens: in a segment, tokens; in the index, slots that it knows.
    """

    file: str
    bytes: int
    sha256: str
    tokens: int


@dataclass
class Document:
    """A document as the segments know it; its number is its place in the manifest's list.

    Attributes:
        name: as given to ``Memory.append``.
        tokens: stored.
        first: place in the segments, dropped tokens counted, of its first token.
        last: of its last token.
        sha256: of its text; empty if not known.
        complete: whether all of it was read.
        dropped: its tokens are no longer part of the memory, but still in the segments.
    """

    name: str
    tokens: int
    first: int
    last: int
    sha256: str = ""
    complete: bool = True
    dropped: bool = False


@dataclass
class Manifest:
    """What ``manifest.json`` says; see ``docs/memory_files.md``."""

    layers: list[int]
    num_key_value_heads: int
    head_dim: int
    key_dtype: str
    value_dtype: str
    index: str
    top_k: int | None
    fingerprint: str
    metadata: dict[str, Any]
    documents: list[Document] = field(default_factory=list)
    segments: list[Part] = field(default_factory=list)
    learnt: Part | None = None  # the index's part
    learnt_name: str = ""  # the index that learnt it
    written_by: str = ""
    created: str = ""
    changed: str = ""
    by_cluster: bool = False  # vectors lie cluster after cluster, as far as there were clusters when it was compacted

    def files(self) -> list[Part]:
        """Every part."""
        return [*self.segments, *([self.learnt] if self.learnt else [])]

    def tokens(self) -> int:
        """Tokens in the segments, dropped ones counted."""
        return sum(segment.tokens for segment in self.segments)

    def stamp(self) -> None:
        """Note who writes it, and when."""
        self.written_by = _written_by()
        self.changed = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.created = self.created or self.changed

    def to_json(self) -> str:
        """Its text.

        Raises:
            ValueError: metadata that JSON has no form for.
        """
        content = asdict(self)
        if not self.by_cluster:
            del content["by_cluster"]
        version = FORMAT_VERSION if self.by_cluster else PLAIN_VERSION
        try:
            return json.dumps({"format": FORMAT, "version": version, **content}, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the memory's metadata cannot be saved as JSON: {error}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a memory's folder, checked as far as it can be without the other files.

    Raises:
        OSError: there is no such folder, or it cannot be read.
        ValueError: it holds no memory, one of a newer version, or a manifest that is damaged.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist; a memory is a folder that Memory.save or fot memory build made"
        )
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a memory is a folder that Memory.save or fot memory build made")
    if not path.is_file():
        raise ValueError(f"{folder} holds no memory: it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore it from a copy, or build the memory again") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} does not belong to a memory: its format is not {FORMAT!r}")
    found = content.pop("version", None)
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {found}, but this version of fot reads up to {FORMAT_VERSION}: upgrade fot"
        )
    try:
        return _parse(content)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; restore it from a copy, or build the memory again") from error


def _parse(content: dict[str, Any]) -> Manifest:
    documents = [_make(Document, entry) for entry in _of(content.pop("documents"), list)]
    segments = [_make(Part, entry) for entry in _of(content.pop("segments"), list)]
    learnt = content.pop("learnt")
    content.setdefault("by_cluster", False)
    manifest = _make(Manifest, content | {"documents": [], "segments": [], "learnt": None})
    manifest.documents, manifest.segments = documents, segments
    manifest.learnt = None if learnt is None else _make(Part, learnt)
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    for name in ("key_dtype", "value_dtype"):
        if getattr(manifest, name) not in VECTOR_DTYPES:
            raise ValueError(f"{name} is {getattr(manifest, name)!r}")
    numbers = [_of(layer, int) for layer in manifest.layers]
    if len(set(numbers)) != len(numbers) or min(numbers, default=0) < 0:
        raise ValueError(f"layers are {numbers}")
    if manifest.num_key_value_heads < 1 or manifest.head_dim < 1:
        raise ValueError("a memory has at least one KV head of at least one number")
    if max(map(int, re.findall(r"\d{1,18}", manifest.index)), default=0) > MOST_LISTS or len(manifest.index) > 200:
        raise ValueError(f"index {manifest.index[:200]!r} asks for more than {MOST_LISTS:,} lists")
    for part in manifest.files():
        kind = "index" if part is manifest.learnt else "segment"
        named = PART_NAME.fullmatch(part.file)
        if not named or named[1] != kind or part.bytes < 8 or part.tokens < 0:
            raise ValueError(f"{part.file!r} is no {kind} of a memory")
    if len({part.file for part in manifest.files()}) != len(manifest.files()):
        raise ValueError("it names a part twice")
    names = [document.name for document in manifest.documents if not document.dropped]
    if len(set(names)) != len(names):
        raise ValueError("it names a document twice")


def _make(kind: Callable[..., T], entry: Any) -> T:
    """A dataclass from a JSON object with exactly its fields, each of its type."""
    wanted = {f.name: f.type for f in fields(kind)}  # type: ignore[arg-type]
    if set(_of(entry, dict)) != set(wanted):
        different = sorted(set(entry) ^ set(wanted))
        raise ValueError(f"{different[0]!r} is missing or unknown")
    for name, value in entry.items():
        plain: Any = getattr(wanted[name], "__origin__", wanted[name])  # list of list[int]
        if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
            raise ValueError(f"{name} is {str(value)[:60]!r}")
    return kind(**entry)


def _of(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{str(value)[:60]!r} is not of type {kind.__name__}")
    return value


def _written_by() -> str:
    try:
        return f"fot {version('fot')}"
    except PackageNotFoundError:
        return "fot"
