"""Where files come from, with a real HTTP server on this machine in place of the publishers."""

import csv
import gzip
import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedsim.data.datasets import adult, drug_consumption, fashion_mnist, filmtrust, movielens_100k
from fedsim.data.files import load
from fedsim.data.sources import ADULT, COMPAS, DRUG_CONSUMPTION, FASHION_MNIST, FILMTRUST, MOVIELENS_100K, Source

real = pytest.mark.skipif(
    "FEDSIM_DATA" not in os.environ, reason="needs the data sets: set FEDSIM_DATA to their folder"
)
DATA = Path(os.environ.get("FEDSIM_DATA", "."))  # read before a test takes the variable away

TEXT = b"1, 2\n3, 4\n" * 1000
WORDS = b"a b\n" * 500
TABLE = b'name,age,extra,age\n"Doe, Jane",30,1.0,x\nRoe,-4.0,2.5,y\n'
KEPT = b"extra,age\n1,30\n2.5,-4\n"  # the columns in this order, the first "age", and 1.0 and -4.0 as whole numbers


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


ARCHIVED = Source("pair", "https://publisher.invalid/some/pair.zip", {"one": checksum(TEXT), "two": checksum(WORDS)})
SINGLE = Source("single", "https://publisher.invalid/{name}.gz", {"one": checksum(TEXT)})
PERSONAL = Source("people", "https://publisher.invalid/{name}", {"p.csv": checksum(KEPT)}, ("extra", "age"))


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"folder/{name}", content)
    return buffer.getvalue()


class Publisher:
    """A server of `files`; `promised` makes it announce more bytes than it sends."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.promised = 0
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if self.path not in outer.files:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.files[self.path]) + outer.promised))
                self.end_headers()
                self.wfile.write(outer.files[self.path])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def content(folder: str, name: str) -> bytes:
    place = DATA / folder / name
    return place.read_bytes() if place.exists() else gzip.decompress((DATA / folder / f"{name}.gz").read_bytes())


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "cache"


@pytest.fixture
def publisher(cache, monkeypatch) -> Iterator[Publisher]:
    server = Publisher()
    monkeypatch.setenv("FEDSIM_MIRROR", server.address + "/")
    yield server
    server.close()


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_gz", ".gz")).write_bytes(content)
    return folder


def nothing_in(cache: Path) -> bool:
    return not [path for path in cache.rglob("*") if path.is_file()]


def test_a_folder_given_as_path_is_used_as_it_is_plain_or_compressed(tmp_path, cache):
    folder = write(tmp_path / "mine", one=b"my own", two_gz=gzip.compress(b"other"))
    files = load(ARCHIVED, folder)
    assert {name: file.content for name, file in files.items()} == {"one": b"my own", "two": b"other"}
    assert files["two"].where == str(folder / "two.gz")
    assert nothing_in(cache)


def test_a_path_without_the_files_is_an_error_and_nothing_is_fetched(tmp_path, publisher):
    publisher.files["/pair/pair.zip"] = archive(one=TEXT, two=WORDS)
    folder = write(tmp_path / "half", one=TEXT)
    with pytest.raises(FileNotFoundError, match=r"path must be a folder that has one, two .*half"):
        load(ARCHIVED, folder)
    assert publisher.asked == []


def test_the_order_is_path_then_data_folder_then_cache_then_publisher(tmp_path, publisher, monkeypatch):
    publisher.files["/single/one.gz"] = gzip.compress(TEXT)
    cached = tmp_path / "cache" / "single" / "one"
    assert load(SINGLE)["one"].where.startswith(publisher.address)
    assert load(SINGLE)["one"].where == str(cached)
    local = write(tmp_path / "data" / "single", one_gz=gzip.compress(TEXT))
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "data"))
    assert load(SINGLE)["one"].where == str(local / "one.gz")
    mine = write(tmp_path / "mine", one=TEXT)
    assert load(SINGLE, mine)["one"].where == str(mine / "one")
    assert publisher.asked == ["/single/one.gz"]


def test_members_of_a_zip_archive_are_fetched_once_and_kept_alone(publisher, cache):
    publisher.files["/pair/pair.zip"] = archive(one=TEXT, two=WORDS, three=b"unwanted")
    for _ in range(2):
        assert {name: file.content for name, file in load(ARCHIVED).items()} == {"one": TEXT, "two": WORDS}
    assert publisher.asked == ["/pair/pair.zip"]
    assert sorted(path.name for path in (cache / "pair").iterdir()) == ["one", "two"]


def test_a_damaged_cache_is_fetched_again(publisher, cache, caplog):
    publisher.files["/single/one.gz"] = gzip.compress(TEXT)
    for damage in (TEXT[:-1], b"", gzip.compress(TEXT)[:-9]):
        write(cache / "single", one=damage)
        assert load(SINGLE)["one"].content == TEXT
        assert (cache / "single" / "one").read_bytes() == TEXT
    assert caplog.text.count("fetched again") == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (gzip.compress(TEXT + b"5, 6\n"), "checksum"),
        (gzip.compress(TEXT)[:-20], "truncated or damaged"),
        (b"", "is empty"),
        (gzip.compress(b""), "is empty"),
        (b"<html>Moved</html>", "checksum"),
    ],
)
def test_what_is_not_the_expected_file_is_refused_and_leaves_nothing_behind(publisher, cache, damage, message):
    publisher.files["/single/one.gz"] = damage
    with pytest.raises(ValueError, match=rf"(?s)/single/one.*{message}.*Set FEDSIM_DATA to a folder that has single/"):
        load(SINGLE)
    assert nothing_in(cache)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (archive(one=TEXT, two=WORDS)[:-30], "truncated or damaged"),
        (archive(one=TEXT), "no two"),
        (archive(one=TEXT, two=WORDS + b"!"), "checksum .* of two"),
        (b"", "truncated or damaged"),
    ],
)
def test_what_is_not_the_expected_archive_is_refused_and_leaves_nothing_behind(publisher, cache, damage, message):
    publisher.files["/pair/pair.zip"] = damage
    with pytest.raises(ValueError, match=rf"(?s)pair\.zip.*{message}.*Set FEDSIM_DATA"):
        load(ARCHIVED)
    assert nothing_in(cache)


def test_a_connection_that_breaks_off_leaves_nothing_behind(publisher, cache):
    publisher.files["/single/one.gz"] = gzip.compress(TEXT)
    publisher.promised = 100
    with pytest.raises(ConnectionError, match="one.gz could not be fetched"):
        load(SINGLE)
    assert nothing_in(cache)


def test_a_file_that_the_publisher_lacks_and_a_publisher_out_of_reach_are_told_with_a_remedy(publisher, cache):
    with pytest.raises(
        ConnectionError, match=r"could not be fetched. Set FEDSIM_DATA to a folder that has pair/.*\(404"
    ):
        load(ARCHIVED)
    publisher.server.server_close()
    with pytest.raises(ConnectionError, match=r"could not be fetched.*or give that one as path"):
        load(ARCHIVED)
    assert nothing_in(cache)


def test_wrong_and_damaged_files_in_the_data_folder_are_refused(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    for content, message in ((TEXT[1:], "checksum"), (b"", "is empty"), (gzip.compress(TEXT)[:50], "truncated")):
        write(tmp_path / "single", one=content)
        with pytest.raises(ValueError, match=rf"single/one.*{message}"):
            load(SINGLE)


def test_a_data_folder_without_this_data_set_is_passed_over(tmp_path, publisher, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "nowhere"))
    publisher.files["/single/one.gz"] = TEXT  # an address in .gz may be sent uncompressed
    assert load(SINGLE)["one"].content == TEXT


def test_only_the_columns_that_are_used_are_kept_or_cached(publisher, cache):
    publisher.files["/people/p.csv"] = TABLE
    assert load(PERSONAL)["p.csv"].content == KEPT
    assert (cache / "people" / "p.csv").read_bytes() == KEPT
    assert load(PERSONAL)["p.csv"].where == str(cache / "people" / "p.csv")
    assert publisher.asked == ["/people/p.csv"]


def test_a_csv_file_without_a_column_or_with_a_short_line_is_refused(tmp_path, cache):
    for content, message in (
        (b"name,age\nx,1\n", r"line 1: there is no column extra"),
        (TABLE + b"Poe,5\n", r"line 4: 2 columns, the header has 4"),
    ):
        folder = write(tmp_path / "people", **{"p.csv": content})
        with pytest.raises(ValueError, match=rf"p\.csv, {message}"):
            load(PERSONAL, folder)


def test_the_publishers_addresses_are_those_of_the_mirror_with_another_beginning(publisher):
    for source, address in ((ADULT, "/adult/adult.zip"), (COMPAS, "/compas/compas-scores-two-years.csv")):
        with pytest.raises(ConnectionError):
            load(source)
        assert publisher.asked[-1] == address


@real
@pytest.mark.parametrize(
    ("loader", "source", "examples"),
    [
        (adult, ADULT, 48_842),
        (drug_consumption, DRUG_CONSUMPTION, 1885),
        (fashion_mnist, FASHION_MNIST, 60_000),
        (movielens_100k, MOVIELENS_100K, 100_000),
        (filmtrust, FILMTRUST, 35_494),
    ],
)
def test_the_real_files_pass_their_checksums_when_fetched(publisher, loader, source, examples):
    files = {name: content(source.folder, name) for name in source.sha256}
    ending = source.url.rsplit("/", 1)[1]
    if ending.endswith(".zip"):
        publisher.files[f"/{source.folder}/{ending}"] = archive(**files)
    else:
        publisher.files |= {
            f"/{source.folder}/{ending.format(name=name)}": gzip.compress(file, 1) for name, file in files.items()
        }
    assert len(loader()) == len(loader()) == examples
    assert len(publisher.asked) == len(publisher.files)


@real
def test_compas_as_its_publisher_has_it_passes_the_checksum_and_names_are_never_kept(publisher, cache):
    name = "compas-scores-two-years.csv"
    header, *rows = csv.reader(io.StringIO(content("compas", name).decode()))
    # The publisher names two columns twice, writes -1 where the copy has -1.0, and has columns about persons.
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(["name", "dob", *(column.removesuffix(".1") for column in header)])
    writer.writerows(["Jane Roe", "1970-01-01", *(cell.removesuffix(".0") for cell in row)] for row in rows)
    publisher.files[f"/compas/{name}"] = text.getvalue().encode()
    assert load(COMPAS)[name].content == load(COMPAS, DATA / "compas")[name].content
    cached = (cache / "compas" / name).read_bytes()
    assert b"name" not in cached and b"Jane Roe" not in cached and cached.startswith(b"sex,age,race,")
    publisher.files[f"/compas/{name}"] = text.getvalue().replace(",Male,69,", ",Male,68,").encode()
    (cache / "compas" / name).unlink()
    with pytest.raises(ValueError, match="checksum"):
        load(COMPAS)
    assert nothing_in(cache)
