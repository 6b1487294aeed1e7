"""Tar archives from the web: downloaded once, verified, and read without unpacking."""

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.common.errors import UsageError
from experiments.data.progress import progress

_CHUNK = 1 << 20
_TEXT_LIMIT = 1 << 16
# Maximum unpacked size of other members in bytes.
_OTHER_LIMIT = 1 << 22


@dataclass(frozen=True)
class Archive:
    """The source of an archive.

    Attributes:
        url: Its address; the last part is the file's name.
        md5: The checksum published by its authors; None, only in tests, disables the check.
    """

    url: str
    md5: str | None

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


def fetch(archive: Archive, root: Path, flag: str) -> Path:
    """The archive's path in `root` or ``root/downloads``; downloads it to the latter if missing.

    Raises:
        UsageError: It is damaged, or missing and cannot be downloaded.
    """
    for folder in (root, root / "downloads"):
        path = folder / archive.file
        if path.is_file():
            with path.open("rb") as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
            if archive.md5 not in (None, md5):
                raise UsageError(
                    f"{flag}: {path} is damaged (md5 {md5}, expected {archive.md5}); delete it to "
                    f"download it again, or put an intact {archive.file} there"
                )
            return path
    try:
        md5 = _download(archive, path)
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(
            f"{flag}: --data_dir={root} holds neither the prepared data set nor {archive.file}, "
            f"and downloading {archive.url} failed ({error}); put that file into {root}"
        ) from error
    if archive.md5 not in (None, md5):
        path.unlink()
        raise UsageError(
            f"{flag}: {archive.url} was downloaded damaged (md5 {md5}, expected {archive.md5}); "
            f"try again, or put an intact {archive.file} into {root}"
        )
    return path


def members(path: Path, sizes: Mapping[str, int | None], flag: str) -> dict[str, bytes]:
    """The contents of the named members, read in one pass over the stream.

    Nothing is written to disk. Sizes are checked before reading: that of each member against its
    expected size, that of the whole stream against their sum.

    Args:
        path: A ``.tar.gz`` file.
        sizes: The expected size in bytes of each member to read; None for a short text.
        flag: The argument that an error names.

    Raises:
        UsageError: The archive is damaged, or a member is missing or of another size.
    """
    found: dict[str, bytes] = {}
    most = sum(_TEXT_LIMIT if size is None else size for size in sizes.values()) + _OTHER_LIMIT
    try:
        with (
            gzip.open(path) as packed,
            tarfile.open(fileobj=_Bounded(packed, most), mode="r|") as tar,
        ):
            for member in tar:
                if member.name not in sizes:
                    continue
                expected = sizes[member.name]
                fits = member.size <= _TEXT_LIMIT if expected is None else member.size == expected
                if not member.isreg() or not fits or member.name in found:
                    raise UsageError(
                        f"{flag}: the member {member.name} of {path} has {member.size} bytes, "
                        f"expected {expected or f'{_TEXT_LIMIT} at most'}, as one plain file; "
                        "replace the archive"
                    )
                file = tar.extractfile(member)
                found[member.name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{flag}: {path} is damaged ({error}); replace the archive") from error
    if missing := sorted(sizes.keys() - found.keys()):
        raise UsageError(f"{flag}: {path} lacks the member {missing[0]}; replace the archive")
    return found


class _Bounded(io.RawIOBase):
    """A stream that raises an error beyond ``most`` bytes, and for repeated reads at its end, where
    tarfile would skip a huge member in small steps."""

    def __init__(self, file: gzip.GzipFile, most: int) -> None:
        self._file, self._left, self._ends = file, most, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        content = self._file.read(size)
        self._left -= len(content)
        self._ends += not content
        if self._left < 0:
            raise OSError("it unpacks to more than it should hold")
        if self._ends > 2:
            raise OSError("it ends inside of a member")
        return content


def _download(archive: Archive, path: Path) -> str:
    """Downloads to `path` atomically; returns the md5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)
    with (
        urllib.request.urlopen(archive.url, timeout=60) as response,
        tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file,
    ):
        try:
            length = int(response.headers.get("Content-Length") or 0)
            done = 0
            with progress(f"downloading {archive.file}, MB", length // 10**6 or None) as advance:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    advance((done + len(chunk)) // 10**6 - done // 10**6)
                    done += len(chunk)
            if length and done != length:
                raise OSError(f"the connection broke after {done} of {length} bytes")
            file.close()
            os.replace(file.name, path)
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    return digest.hexdigest()
