"""Names the version of a model by the content of its files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

DIGITS = 12  # of the hash: enough that no two versions of one model have the same name


def version_of(files: Iterable[Path]) -> str:
    """Return a hash of the content of `files`; those that do not exist count as empty. Raises OSError."""
    content = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest())
        content.update(b"|")
    return content.hexdigest()[:DIGITS]
