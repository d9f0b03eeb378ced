"""Files as documents of a memory: find them, read their text, add them step by step, keep up with them."""

from fot.documents.add import Added, add_document, add_documents
from fot.documents.find import Documents, describe_left_out, find_documents
from fot.documents.options import Options
from fot.documents.read import EmptyDocumentError, read_document
from fot.documents.record import note_sources
from fot.documents.sync import Plan, carry_out, plan_sync

__all__ = [
    "Added",
    "Documents",
    "EmptyDocumentError",
    "Options",
    "Plan",
    "add_document",
    "add_documents",
    "carry_out",
    "describe_left_out",
    "find_documents",
    "note_sources",
    "plan_sync",
    "read_document",
]
