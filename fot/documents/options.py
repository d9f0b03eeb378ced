"""How documents are read and which files of a folder are taken: what a user may ask for."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """Choices for reading.

    Attributes:
        encoding: of plain texts that have no byte order mark; None: UTF-8, and what is no UTF-8 is detected.
        field: of the objects in JSON Lines files, with dots for objects in objects; None: ``text``.
        ignored: also read what ``.gitignore`` and ``.fotignore`` leave out of folders.
        secrets: also read ``.env``, key files and the like from folders.
        generated: also read minified and generated files from folders.

    Raises:
        ValueError: an encoding that Python does not know, or an empty field.
    """

    encoding: str | None = None
    field: str | None = None
    ignored: bool = False
    secrets: bool = False
    generated: bool = False

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                "x".encode(self.encoding)  # "hex" is a codec, but of no text
            except (LookupError, ValueError, UnicodeError):
                raise ValueError(
                    f"{self.encoding!r} is no encoding of text that Python knows: give one such as windows-1252, "
                    "utf-16-le or shift_jis"
                ) from None
        if self.field is not None and not self.field.strip():
            raise ValueError("the field is empty: give the name of a field such as text")

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, for JSON."""
        return {name: value for name, value in asdict(self).items() if value != getattr(DEFAULT, name)}


DEFAULT = Options()
