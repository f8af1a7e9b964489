"""Published files reach the cache whole and checked, or not at all; what servers do wrong is a sentence."""

from __future__ import annotations

import hashlib
import io
import random
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openpyxl
import pytest

import nlme_sbi.io.download as module
from nlme_sbi.cli import compose_config
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.io.download import PUBLISHED, cache_directory, download
from nlme_sbi.stages.download import download_data

Answer = Callable[[BaseHTTPRequestHandler], None]


def workbook() -> bytes:
    """Two cells at three times, as the published sheet holds them: seconds, then values."""
    book = openpyxl.Workbook()
    for row in ((600, 1.0, 2.0), (1200, 3.0, 4.0), (3600, 5.0, 6.0)):
        book.active.append(row)
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


SHEET = workbook()
MEMBER = PUBLISHED[0].member
MEMBERS = {"code/README": random.Random(1).randbytes(2_000_000), MEMBER: SHEET}
WHOLE = zipped(MEMBERS)


class Server:
    """A web server whose next answers are given as functions; remembers the ranges that were asked for."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.ranges: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.ranges.append(self.headers.get("Range"))
                outer.answers.pop(0)(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/code.zip"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def sends(content: bytes, *, keep: int | None = None, ranges: bool = True, length: bool = True) -> Answer:
    """Answer with ``content``; after ``keep`` bytes of it the connection breaks off."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked and ranges else 0
        if start >= len(content):
            handler.send_error(416)
            return
        handler.send_response(206 if asked and ranges else 200)
        if length:
            handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start:] if keep is None else content[start : start + keep])

    return answer


def refuses(code: int) -> Answer:
    return lambda handler: handler.send_error(code)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """The server, a cache of one's own, and the small workbook in the place of the published file."""
    monkeypatch.setenv("NLME_SBI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    running = Server()
    small = replace(PUBLISHED[0], url=running.url, sha256=hashlib.sha256(SHEET).hexdigest())
    monkeypatch.setattr(module, "PUBLISHED", (small,))
    yield running
    running.stop()


def left() -> list[str]:
    """What lies in the cache."""
    return sorted(path.name for path in cache_directory().iterdir())


def test_the_file_is_fetched_once_and_the_data_choice_finds_it(server: Server) -> None:
    section = compose_config("fit_population", ["data=egfp"]).data
    with pytest.raises(
        ValueError, match=r"has not been downloaded .*: python scripts/download_data\.py data=egfp\. Or"
    ):
        instantiate(section, where="data").read()
    server.answers = [sends(WHOLE)]
    cfg = compose_config("download_data", ["data=egfp"])
    download_data(cfg)
    download_data(cfg)  # asks for nothing: the server has no second answer
    assert left() == ["20160427_mean_eGFP.xlsx"]
    observations = instantiate(section, where="data").read()
    assert observations.values.shape == (2, 3, 1)
    assert observations.design.times[0].tolist() == pytest.approx([1 / 6, 1 / 3, 1.0])


def test_a_damaged_copy_in_the_cache_is_fetched_again(server: Server) -> None:
    server.answers = [sends(WHOLE), sends(WHOLE)]
    path, _ = download(module.PUBLISHED[0])
    path.write_bytes(SHEET[:-1])
    assert download(module.PUBLISHED[0]) == (path, True)
    assert path.read_bytes() == SHEET


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(server: Server) -> None:
    server.answers = [sends(WHOLE, keep=1_000_000), sends(WHOLE)]
    path, _ = download(module.PUBLISHED[0])
    assert path.read_bytes() == SHEET
    assert server.ranges == [None, "bytes=1000000-"]


def test_the_next_command_goes_on_where_the_last_one_stopped(server: Server) -> None:
    server.answers = [sends(WHOLE, keep=700_000), sends(WHOLE, keep=0)]
    with pytest.raises(OSError, match=r"the connection broke off\)\. 0\.7 MB are kept: run the same command again"):
        download(module.PUBLISHED[0])
    assert left() == [".20160427_mean_eGFP.xlsx.zip.partial"]
    server.answers = [sends(WHOLE)]
    path, _ = download(module.PUBLISHED[0])
    assert path.read_bytes() == SHEET
    assert server.ranges[-1] == "bytes=700000-"
    assert left() == [path.name]


def test_a_server_without_ranges_or_lengths_sends_everything_again(server: Server) -> None:
    server.answers = [sends(WHOLE, keep=700_000), sends(WHOLE, ranges=False, length=False)]
    path, _ = download(module.PUBLISHED[0])
    assert path.read_bytes() == SHEET


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ([sends(WHOLE[:-100])], r"did not send a complete zip archive \(.*\); it was removed\. Run the same"),
        ([sends(b"<html>Log in to the hotel's network</html>")], "did not send a complete zip archive"),
        ([sends(zipped({MEMBER: SHEET[:-1]}))], r"is not the published file: its SHA-256 begins with \w{12}, not"),
        ([sends(zipped({"code/other.xlsx": SHEET}))], f"does not hold {re.escape(MEMBER)}"),
        ([refuses(404)], "answered 404 Not Found"),
        ([refuses(503)], "answered 503 Service Unavailable"),
        ([sends(WHOLE, keep=0)], r"could not be read \(the connection broke off\)"),
    ],
    ids=["cut off", "a web page", "another file", "no such member", "404", "503", "nothing"],
)
def test_what_is_not_the_published_file_is_refused_and_leaves_nothing(
    server: Server, answers: list[Answer], sentence: str
) -> None:
    server.answers = answers
    with pytest.raises((ValueError, OSError), match=sentence) as refusal:
        download(module.PUBLISHED[0])
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("and pass data.path=FILE.")
    assert left() == []


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bits_in_the_archive_are_refused(server: Server, compression: int) -> None:
    damaged = bytearray(zipped(MEMBERS, compression))
    start = damaged.index(MEMBER.encode()) + len(MEMBER)
    damaged[start + 1000 : start + 1010] = bytes(10)
    server.answers = [sends(bytes(damaged))]
    with pytest.raises(ValueError, match="did not send a complete zip archive"):
        download(module.PUBLISHED[0])
    assert left() == []


def test_without_a_network_the_way_by_hand_is_told(server: Server) -> None:
    for address, reason in (("http://127.0.0.1:9/code.zip", "refused"), ("http://nowhere.invalid/code.zip", ".")):
        with pytest.raises(
            OSError, match=rf"{address} could not be read \(.*{reason}.*\)\. Or download {server.url} by other"
        ):
            download(module.PUBLISHED[0], url=address)
    with pytest.raises(ValueError, match=r'^"file:///etc/passwd" is not an http or https address\.$'):
        download(module.PUBLISHED[0], url="file:///etc/passwd")


def test_a_full_disk_while_downloading_is_a_sentence(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [sends(WHOLE)]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nlme_sbi.runs.files.os.fsync", full)
    with pytest.raises(OSError, match=r"eGFP\.xlsx could not be written: the disk is full; free some space"):
        download(module.PUBLISHED[0])
    assert left() == []


def test_two_downloads_at_once_are_refused(server: Server) -> None:
    archive = cache_directory() / ".20160427_mean_eGFP.xlsx.zip.partial"
    with module._open_locked(archive), pytest.raises(ValueError, match="is being downloaded by another process"):
        download(module.PUBLISHED[0])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["data=theophylline"],
            r"^These data are not downloaded: their file is data/theophylline/theophylline\.csv\. To",
        ),
        (["data=long_table"], r"^These data are not downloaded: their file is yours\. To download: data=egfp\.$"),
        (
            ["data.path=cached:cells.csv"],
            r"^cached:cells\.csv is not a published file that can be downloaded; those are",
        ),
        (["url=3"], r"^url must be text"),
        (["data=egpf"], r'^data has no choice "egpf"; .* Did you mean egfp\?$'),
    ],
)
def test_what_cannot_be_downloaded_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        download_data(compose_config("download_data", overrides))


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NLME_SBI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "nlme_sbi"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_directory() == tmp_path / "me" / ".cache" / "nlme_sbi"
    monkeypatch.setenv("NLME_SBI_CACHE", "~/elsewhere")
    assert cache_directory() == tmp_path / "me" / "elsewhere"
