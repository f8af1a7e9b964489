"""Published data, which are downloaded once into a cache and then found by name: ``data.path=cached:NAME``."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from nlme_sbi.compute.progress import Progress
from nlme_sbi.runs.files import PARTIAL, could_not_write, sha256_of_file, write_atomically

CACHED = "cached:"  # a data.path with this prefix is a name in the cache
_CHUNK = 1 << 18
_TIMEOUT = 60.0  # seconds without a byte
_MOST_BYTES = 2**32  # of an archive, and of the file in it
_ATTEMPTS = 3  # connections that may break off as long as each makes progress


@dataclass(frozen=True)
class PublishedFile:
    """A file inside a published zip archive.

    Args:
        data: the choice in ``conf/data/`` that reads it.
        name: its name in the cache.
        url: of the archive.
        member: its path in the archive.
        sha256: of the file, not of the archive, which the repository may repack.
        source: its authors and licence.
    """

    data: str
    name: str
    url: str
    member: str
    sha256: str
    source: str


PUBLISHED = (
    PublishedFile(
        data="egfp",
        name="20160427_mean_eGFP.xlsx",
        url="https://zenodo.org/records/1228899/files/code.zip",
        member="code/project/data/20160427_mean_eGFP.xlsx",
        sha256="bc2470a2ca6f67e9062ef6c1eaf588ae164f961a323df2b30ff731c1867b0932",
        source="Fröhlich et al. (2018), Zenodo record 1228899, CC-BY-SA-4.0",
    ),
)


def cache_directory() -> Path:
    """``$NLME_SBI_CACHE``, else ``nlme_sbi`` in ``$XDG_CACHE_HOME``, else ``~/.cache/nlme_sbi``."""
    own = os.environ.get("NLME_SBI_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nlme_sbi"


def find_published(path: str | os.PathLike[str]) -> PublishedFile | None:
    """The published file that ``cached:NAME`` means; None for any other path.

    Raises:
        ValueError: there is no published file of this name; with the names that exist.
    """
    text = str(path)
    if not text.startswith(CACHED):
        return None
    name = text.removeprefix(CACHED)
    for file in PUBLISHED:
        if file.name == name:
            return file
    known = ", ".join(CACHED + file.name for file in PUBLISHED)
    raise ValueError(f"{text} is not a published file that can be downloaded; those are {known}.")


def find_cached(file: PublishedFile) -> Path:
    """Path of a downloaded file.

    Raises:
        ValueError: the file is missing or has another checksum; with the command that downloads it.
    """
    path = cache_directory() / file.name
    if not path.is_file():
        raise ValueError(
            f"data={file.data} has not been downloaded (there is no {path}). Run: python scripts/download_data.py "
            f"data={file.data}. Or pass data.path=FILE if you have {file.name}."
        )
    found = sha256_of_file(path)  # checked again: a cache is a folder that others may write to
    if found != file.sha256:
        raise ValueError(
            f"{path} is not the published file: its SHA-256 begins with {found[:12]}, not {file.sha256[:12]}. Run: "
            f"python scripts/download_data.py data={file.data}, which downloads it again."
        )
    return path


def download(file: PublishedFile, *, url: str | None = None) -> tuple[Path, bool]:
    """Download a published file into the cache, checked by its SHA-256 before it gets its name.

    An interrupted download continues where it stopped if the server supports it.

    Args:
        file: to download.
        url: another address of the same archive.

    Returns:
        Path of the file, and whether it was downloaded now.

    Raises:
        ValueError: the address is not one, the archive is broken, or the file has another checksum.
        OSError: the server cannot be reached or refuses, or the file cannot be written.
    """
    path = cache_directory() / file.name
    if path.is_file() and sha256_of_file(path) == file.sha256:
        return path, False
    address = url or file.url
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f'"{address}" is not an http or https address.')
    archive = path.with_name(f".{file.name}.zip{PARTIAL}")
    with _open_locked(archive) as stream:
        _fetch(address, stream, archive, file)
        try:
            _extract(file, archive, path, address)
        finally:
            archive.unlink(missing_ok=True)  # no longer needed, or broken
    return path, True


@contextlib.contextmanager
def _open_locked(archive: Path) -> Iterator[IO[bytes]]:
    """Open the archive for appending, for one process at a time; an empty one is removed afterwards."""
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        stream = archive.open("ab")
    except OSError as error:
        raise could_not_write(archive, error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{archive} is being downloaded by another process; wait for it.") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield stream
        finally:
            if archive.exists() and archive.stat().st_size == 0:
                archive.unlink()


def _fetch(address: str, stream: IO[bytes], archive: Path, file: PublishedFile) -> None:
    """Append the rest of the archive; connections that break off are resumed as long as each makes progress."""
    for attempt in range(_ATTEMPTS):
        before = archive.stat().st_size
        try:
            if _append(address, stream):
                return
            problem = "the connection broke off"
        except urllib.error.HTTPError as error:
            error.close()
            raise OSError(f"{address} answered {error.code} {error.reason}. {_by_hand(file)}") from None
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        if archive.stat().st_size == before or attempt == _ATTEMPTS - 1:
            kept = archive.stat().st_size
            there = f" {kept / 1e6:.1f} MB are kept: run the same command again to continue." if kept else ""
            raise OSError(f"{address} could not be read ({problem}).{there} {_by_hand(file)}")


def _append(address: str, stream: IO[bytes]) -> bool:
    """Download what is missing; returns whether the archive is now complete."""
    have = stream.seek(0, os.SEEK_END)
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()  # nothing is missing, or the server's archive has changed: the checksum decides
        return True
    with response:
        if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
            stream.truncate(0)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None and length.isdigit() else 0
        with Progress(total, "byte", "download", done=have, every=5.0) as progress:
            while chunk := response.read(_CHUNK):
                try:
                    stream.write(chunk)
                except OSError as error:
                    raise could_not_write(Path(stream.name), error) from error
                have += len(chunk)
                if have > _MOST_BYTES:
                    raise ValueError(f"{address} sends more than {_MOST_BYTES >> 30} GiB, so it is another file.")
                progress.update(len(chunk))
        stream.flush()
    return not total or have >= total


def _extract(file: PublishedFile, archive: Path, path: Path, address: str) -> None:
    """Write the member under its name if its checksum is the published one."""

    def write(target: BinaryIO) -> None:
        digest = hashlib.sha256()
        with zipfile.ZipFile(archive) as opened, opened.open(file.member) as member:
            if opened.getinfo(file.member).file_size > _MOST_BYTES:
                raise ValueError(f"{file.member} from {address} unpacks to more than {_MOST_BYTES >> 30} GiB.")
            while chunk := member.read(_CHUNK):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise ValueError(
                f"{file.member} from {address} is not the published file: its SHA-256 begins with "
                f"{digest.hexdigest()[:12]}, not {file.sha256[:12]}. Nothing was kept. {_by_hand(file)}"
            )

    try:
        write_atomically(path, write)
    except KeyError:
        raise ValueError(f"The archive at {address} does not hold {file.member}. {_by_hand(file)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{address} did not send a complete zip archive ({error}); it was removed. Run the same command again. "
            f"{_by_hand(file)}"
        ) from None


def _by_hand(file: PublishedFile) -> str:
    return f"Or download {file.url} by other means, extract {file.member} and pass data.path=FILE."
