"""Files as documents of a memory: find them, read their text, add them step by step."""

from fot.documents.add import add_document, add_documents
from fot.documents.find import Documents, describe_left_out, find_documents
from fot.documents.read import EmptyDocumentError, read_document

__all__ = [
    "Documents",
    "EmptyDocumentError",
    "add_document",
    "add_documents",
    "describe_left_out",
    "find_documents",
    "read_document",
]
