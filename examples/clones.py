"""Files of public git repositories, for the scripts here that fetch texts; of clones on this machine, if there are."""

import io
import subprocess
import tarfile
import tempfile
from pathlib import Path


def read_files(url: str, paths: list[str], clones: Path | None = None) -> dict[str, str]:
    """The text files of a repository's latest commit, by their paths there.

    Args:
        url: of the repository.
        paths: files and folders that are wanted.
        clones: folder that holds a clone under the repository's name, bare or not; None clones it for the moment.

    Raises:
        FileNotFoundError: no such clone.
        subprocess.CalledProcessError: git says why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if clones is None:
            folder = Path(scratch)
            subprocess.run(["git", "clone", "--quiet", "--bare", "--depth", "1", url, scratch], check=True)
        else:
            folder = clones / url.rpartition("/")[2]
            if not folder.is_dir():
                raise FileNotFoundError(f"no such clone: {folder}; run git clone {url} there, or omit --from")
        command = ["git", "-C", str(folder), "archive", "--format=tar", "HEAD", *paths]
        packed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                found[member.name] = file.read().decode("utf-8-sig")
    return found


def write(file: Path, text: str, told: str) -> None:
    """Write a file and the folders above it, and print what it holds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {told}")
