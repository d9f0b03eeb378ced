"""The text of messages and mailboxes, by the standard library."""

import email
import email.policy
import mailbox
import re
from email.message import EmailMessage
from pathlib import Path

from fot.documents.html import html_text

HEADERS = ("From", "To", "Cc", "Date", "Subject")

# The line before each message of a mailbox. Its file often has no suffix.
FROM_LINE = re.compile(rb"From \S.*\d\d:\d\d.*\d{4}.*\r?\n(>?[!-9;-~]+:|\r?\n)")

# A line of a message that would be such a line: who writes the mailbox puts a ">" in front (the mboxrd form).
QUOTED_FROM_LINE = re.compile(rb"^>(>*From )", re.MULTILINE)


def is_mailbox(head: bytes) -> bool:
    """Whether a file that begins so is a mailbox in mbox format."""
    return FROM_LINE.match(head) is not None


def in_maildir(path: Path) -> bool:
    """Whether a file is a message in a mailbox in Maildir format."""
    return path.parent.name in ("cur", "new") and (path.parent.parent / "tmp").is_dir()


def read_message(path: Path) -> str:
    """One message: who, when, about what, and its text."""
    return _text(email.message_from_bytes(path.read_bytes(), policy=email.policy.default))


def read_mailbox(path: Path) -> str:
    """All messages of a file in mbox format, two empty lines between them."""
    box = mailbox.mbox(path, create=False)
    try:
        contents = (QUOTED_FROM_LINE.sub(rb"\1", box.get_bytes(key)) for key in box.iterkeys())
        messages = [email.message_from_bytes(content, policy=email.policy.default) for content in contents]
        return "\n\n\n".join(_text(message) for message in messages)
    finally:
        box.close()


def _text(message: EmailMessage) -> str:
    lines = [f"{name}: {' '.join(value.split())}" for name in HEADERS if (value := _header(message, name))]
    return "\n".join(lines) + "\n\n" + "\n\n".join(part for part in _parts(message) if part.strip())


def _header(message: EmailMessage, name: str) -> str:
    try:
        return str(message.get(name, ""))
    except Exception:  # a damaged address or date; Python's parser raises many things
        return dict(message.raw_items()).get(name, "")


def _parts(message: EmailMessage) -> list[str]:
    """The text of a message, of those attached to it, and the names of other attachments."""
    found = []
    for part in message.walk():
        if part.is_multipart():
            if part.get_content_type() == "message/rfc822":
                found.append("Attached message:")
            continue
        name, kind = part.get_filename(), part.get_content_type()
        if name or part.get_content_maintype() != "text":
            found.append(f"Attachment: {name or kind}")
        elif kind == "text/plain":
            found.append(_decoded(part).strip("\n"))
        elif kind == "text/html" and not _has_plain(message, part):
            found.append(html_text(_decoded(part).encode()))
    return found


def _has_plain(message: EmailMessage, page: EmailMessage) -> bool:
    """Whether a page says in HTML what another part of the message says as plain text."""
    groups = (part for part in message.walk() if part.get_content_type() == "multipart/alternative")
    return any(
        page in members and any(one.get_content_type() == "text/plain" for one in members)
        for group in groups
        for members in [list(group.walk())]
    )


def _decoded(part: EmailMessage) -> str:
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    for encoding in (part.get_content_charset() or "utf-8", "utf-8"):
        try:
            return content.decode(encoding)
        except (LookupError, UnicodeError):  # an encoding that Python does not know; a wrong one
            continue
    return content.decode("windows-1252", "replace")
