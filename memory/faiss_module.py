"""FAISS, of which only one build may be installed: ``faiss-cpu`` and ``faiss-gpu-cu12`` both install ``faiss``.

Two of them in one environment overwrite each other's files, and removing one leaves the other without them.
"""

from importlib.metadata import PackageNotFoundError, version

BUILDS = ("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu")


def installed_builds() -> list[str]:
    """The builds of FAISS that pip knows of in this environment."""
    found = []
    for name in BUILDS:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


def check_one_build() -> None:
    """Refuse an environment with two builds of FAISS.

    Raises:
        ImportError: names them, and says which commands leave one.
    """
    found = installed_builds()
    if len(found) > 1:
        kept = next((name for name in found if "gpu" in name), found[0])
        raise ImportError(
            f"{' and '.join(found)} are installed, and all of them are the package faiss: pip uninstall -y "
            f"{' '.join(found)}, and then pip install {kept}"
        )


check_one_build()
try:
    import faiss
except ImportError as error:
    raise ImportError("this index needs FAISS: pip install faiss-cpu, or use index='exact'") from error

__all__ = ["check_one_build", "faiss", "installed_builds"]
