"""A question with passages in front of it, to be read again."""

from collections.abc import Sequence

# What a person would write who puts a text before another and asks about it.
SOURCE = "From {document}:\n{text}\n"
REQUEST = "{passages}\nAnswer in a few words. {question}"


def with_passages(question: str, passages: Sequence[tuple[str, str]]) -> str:
    """The text of a turn: passages with their sources, then the question.

    Args:
        question: what is asked.
        passages: (document, text) of each, best first. The best comes last, next to the question.
    """
    parts = [SOURCE.format(document=document, text=" ".join(text.split())) for document, text in reversed(passages)]
    return REQUEST.format(passages="\n".join(parts), question=question.strip())
