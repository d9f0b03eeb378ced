"""What of a folder is no document of its owner's: what is ignored, secret, or made by a program."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from pathspec import GitIgnoreSpec

# Later files weigh more, as later lines do.
IGNORE_FILES = (".gitignore", ".fotignore")
EXCLUDED_IN_GIT = Path(".git", "info", "exclude")

# Private keys, passwords and tokens, by the names that tools give to their files.
SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".netrc", "_netrc", ".npmrc", ".pypirc", ".pgpass", ".htpasswd", ".git-credentials"),
    *(
        "id_rsa*",
        "id_dsa*",
        "id_ecdsa*",
        "id_ed25519*",
        "*.pem",
        "*.key",
        "*.ppk",
        "*.p12",
        "*.pfx",
        "*.jks",
        "*.keystore",
    ),
    *(
        "*.kdb",
        "*.kdbx",
        "*.asc.key",
        "credentials",
        "credentials.json",
        "secrets.json",
        "secrets.toml",
        "secrets.y*ml",
    ),
    *("secrets.env", "service-account*.json", "service_account*.json", "client_secret*.json", "*.tfstate", "*.tfvars"),
)
NO_SECRETS = ("*.pub", ".env.example", ".env.sample", ".env.template", "*.example.env")
PRIVATE_KEY = re.compile(r"^-----BEGIN [A-Z ]*PRIVATE KEY", re.MULTILINE)

GENERATED_FOLDERS = {"node_modules", "bower_components", "__pycache__", "site-packages"}
# A virtual environment, a cache: each says so itself.
MARKS_OF_GENERATED_FOLDERS = ("pyvenv.cfg", "CACHEDIR.TAG")
GENERATED_NAMES = (
    *("*.min.js", "*.min.css", "*.min.mjs", "*.bundle.js", "*.map", "*_pb2.py", "*_pb2_grpc.py", "*.pb.go", "*.pb.h"),
    *("*.pb.cc", "*.g.dart", "*.generated.*", "*.designer.cs", "package-lock.json", "npm-shrinkwrap.json", "yarn.lock"),
    *("pnpm-lock.yaml", "bun.lock", "poetry.lock", "uv.lock", "pdm.lock", "pipfile.lock", "cargo.lock", "gemfile.lock"),
    *("composer.lock", "go.sum", "flake.lock", "packages.lock.json"),
)
# What generators write into a comment near the start (the second by a convention of Go that others follow).
GENERATED_HEAD = re.compile(
    r"^\W{0,8}.{0,80}(?:@generated\b"
    r"|\bgenerated\b.{0,80}\bdo not (?:edit|modify)|\bdo not (?:edit|modify)\b.{0,80}\bgenerated\b)",
    re.IGNORECASE | re.MULTILINE,
)
CODE = re.compile(
    r"\.(?:[cm]?[jt]sx?|css|scss|py|go|java|kt|cs|c|h|cc|cpp|hpp|rs|rb|php|swift|dart|scala|lua|sql|svg|json)$",
    re.IGNORECASE,
)
HEAD = 2000  # characters in which such a comment stands
MINIFIED_LINE = 500  # characters of a line, on average, in what no person wrote
SMALLEST_MINIFIED = 2000


def is_secret(name: str) -> bool:
    """Whether files of this name hold passwords or keys."""
    return _fits(name, SECRET_NAMES) and not _fits(name, NO_SECRETS)


def has_private_key(text: str) -> bool:
    """Whether a text is, or holds, a private key."""
    return PRIVATE_KEY.search(text) is not None


def is_generated(name: str) -> bool:
    """Whether files of this name are made by programs: lock files, minified scripts, compiled protocols."""
    return _fits(name, GENERATED_NAMES)


def is_generated_folder(folder: Path) -> bool:
    """Whether a folder holds what package managers put there, or a cache."""
    return folder.name in GENERATED_FOLDERS or any((folder / mark).is_file() for mark in MARKS_OF_GENERATED_FOLDERS)


def looks_generated(name: str, text: str) -> bool:
    """Whether a source file is minified, or says that a program made it."""
    if not CODE.search(name):
        return False
    minified = len(text) >= SMALLEST_MINIFIED and len(text) / (1 + text.count("\n")) > MINIFIED_LINE
    return minified or GENERATED_HEAD.search(text[:HEAD]) is not None


class Ignored:
    """What ``.gitignore`` and ``.fotignore`` leave out of a folder, as git understands them.

    Files of all folders from the repository's on count, the nearest first, and ``.git/info/exclude``.

    Args:
        top: the folder that is read; its repository, if it lies in one, is looked for above it.
    """

    def __init__(self, top: Path) -> None:
        self._specs: dict[Path, GitIgnoreSpec | None] = {}
        here = Path(os.path.realpath(top))
        self._top = top
        self._real = here
        self._root = next((one for one in (here, *here.parents) if (one / ".git").exists()), here)

    def leaves_out(self, path: Path, *, is_folder: bool) -> bool:
        """Whether a file or folder below ``top`` is left out, itself."""
        real = self._real / path.relative_to(self._top)
        for folder in real.parents:
            spec = self._spec(folder)
            if spec is not None:
                inside = real.relative_to(folder).as_posix() + ("/" if is_folder else "")
                decided = spec.check_file(inside).include
                if decided is not None:
                    return decided
            if folder == self._root:
                break
        return False

    def _spec(self, folder: Path) -> GitIgnoreSpec | None:
        if folder not in self._specs:
            names = ([EXCLUDED_IN_GIT] if folder == self._root else []) + list(map(Path, IGNORE_FILES))
            lines = [line for name in names for line in _lines(folder / name)]
            self._specs[folder] = GitIgnoreSpec.from_lines(lines) if lines else None
        return self._specs[folder]


def _lines(path: Path) -> list[str]:
    """The patterns of a file that can be used; none if it cannot be read."""
    try:
        if not path.is_file():
            return []
        lines = path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff").splitlines()
    except OSError:
        return []
    return [line for line in lines if _is_pattern(line)]


def _is_pattern(line: str) -> bool:
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:  # git passes over such lines, too
        return False
    return True


def _fits(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), glob) for glob in globs)
