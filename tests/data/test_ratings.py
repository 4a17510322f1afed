"""Ratings out of files of one's own: what is read right, and what is told of a file that is not."""

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim import doctor
from fedsim.config import assemble, read
from fedsim.data.datasets import CATALOGUE, filmtrust, movielens_100k, ratings
from fedsim.data.describe import describe, draw
from fedsim.data.federation import divide
from fedsim.data.interactions import BLOCK
from fedsim.data.partition import by_column
from fedsim.launch import resume, run
from fedsim.progress import Silent
from fedsim.ranking import WANTED, leave_one_out

ROWS = [("7", "b", "4.5", "30"), ("7", "a", "1", "10"), ("10", "c", "3", "20"), ("9", "a", "5", "20")]


@pytest.fixture
def write(tmp_path):
    """Writes a file, of text in UTF-8 or of bytes, and says where it is."""

    def write(content, name="mine.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def joined(delimiter, rows=ROWS, end="\n"):
    return "".join(delimiter.join(row) + end for row in rows)


def interactions(dataset):
    """(user, item) as the file calls them, with what else there is, in order."""
    columns = {name: column.tolist() for name, column in dataset.columns.items()}
    called = [[dataset.names[name][code] for code in columns.pop(name)] for name in ("user", "item")]
    return list(zip(*called, *columns.values(), strict=True))


EXPECTED = [("7", "b", 4.5, 30), ("7", "a", 1.0, 10), ("10", "c", 3.0, 20), ("9", "a", 5.0, 20)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", " ", "::", "|", ", "])
def test_any_delimiter_and_end_of_line_give_the_same(write, delimiter, end):
    found = ratings(write(joined(delimiter, end=end)), delimiter=delimiter)
    assert interactions(found) == EXPECTED
    assert {name: column.dtype for name, column in found.columns.items()} == {
        "user": torch.int64,
        "item": torch.int64,
        "rating": torch.float32,
        "time": torch.int64,
    }
    assert (found.name, found.test) == ("mine", {})


def test_ids_are_numbered_in_numeric_order_if_all_are_whole_and_else_as_text(write):
    found = ratings(write(joined(",")))
    assert found.names == {"user": ("7", "9", "10"), "item": ("a", "b", "c")}
    assert found.columns["user"].tolist() == [0, 0, 2, 1] and found.columns["item"].tolist() == [1, 0, 2, 0]
    mixed = ratings(write("7,-3\nx,20\n10,1000000000000000\n"), columns=("user", "item"))
    assert mixed.names == {"user": ("10", "7", "x"), "item": ("-3", "20", "1000000000000000")}


def test_ids_are_text_whatever_they_look_like(write):
    text = '07,"a, b"\n7,say ""x""\n7.0,名前\nNaN,$x$ _y\n9999999999999999999999,"say ""x"""\n'
    found = ratings(write(text), columns=("user", "item"))
    assert found.names["user"] == ("07", "7", "7.0", "9999999999999999999999", "NaN")
    assert set(found.names["item"]) == {"a, b", 'say ""x""', "名前", "$x$ _y", 'say "x"'}
    assert ratings(write("07,a\n7,b\n"), columns=("user", "item")).names["user"] == ("07", "7")


def test_quotes_are_a_character_as_any_other_where_cells_are_not_apart_by_commas(write):
    found = ratings(write('1\t"Weird Al" Yankovic\n2\t"\n'), columns=("user", "item"), delimiter="\t")
    assert [item for _, item in interactions(found)] == ['"Weird Al" Yankovic', '"']


def test_columns_may_stand_in_any_order_and_some_be_passed_over(write):
    rows = [(time, "?", item, user) for user, item, _, time in ROWS]
    found = ratings(write(joined(",", rows)), columns=("time", "-", "item", "user"))
    assert list(found.columns) == ["user", "item", "time"]
    assert interactions(found) == [(user, item, time) for user, item, _, time in EXPECTED]


def test_with_a_header_columns_are_found_by_their_names(write):
    rows = [("genre", "item", "time", "user"), *(("x", item, time, user) for user, item, _, time in ROWS)]
    found = ratings(write(joined(",", rows)), header=True)
    assert interactions(found) == [(user, item, time) for user, item, _, time in EXPECTED]
    lens = [("userId", "movieId", "rating", "timestamp"), *ROWS]
    named = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
    assert interactions(ratings(write(joined(",", lens)), named, header=True)) == EXPECTED
    assert interactions(ratings(write(joined(",", lens)), ("user", "item", "rating", "time"), header=True)) == EXPECTED
    some = ratings(write(joined(",", lens)), {"item": "movieId", "user": "userId"}, header=True)
    assert list(some.columns) == ["user", "item"]


def test_blank_lines_and_spaces_around_cells_are_nothing(write):
    assert interactions(ratings(write("\n 7 ,b, 4.5,30\n\n   \n7,a,1 ,10\r\n\r\n10,c,3,20\n9,a,5,20\n\n"))) == EXPECTED
    aligned = " 7   b  4.5   30 \n\n7    a  1     10\n  10 c\t3 20\n9 a 5 20"
    assert interactions(ratings(write(aligned), delimiter=" ")) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
def test_names_survive_their_encoding_and_a_bom_is_no_part_of_them(write, encoding):
    kept = "utf-8-sig" if encoding.startswith(("utf-8", "UTF8")) else encoding
    found = ratings(write("é,ü\nß,ø\n".encode(kept)), columns=("user", "item"), encoding=encoding)
    assert interactions(found) == [("é", "ü"), ("ß", "ø")]


def test_a_header_after_a_bom_is_read(write):
    assert len(ratings(write(b"\xef\xbb\xbfuser,item\n1,2\n"), header=True)) == 1


def test_a_compressed_file_is_read_and_a_damaged_one_refused(write):
    packed = gzip.compress(joined(",").encode())
    found = ratings(write(packed, "some.csv.gz"))
    assert interactions(found) == EXPECTED and found.name == "some"
    with pytest.raises(ValueError, match=r"half.csv.gz: the gzip file is truncated or damaged"):
        ratings(write(packed[:-12], "half.csv.gz"))


def test_of_several_interactions_the_first_in_the_file_is_kept_as_leave_one_out_does(write):
    text = "1,a,5,30\n1,b,1,20\n1,a,2,10\n1,b,4,40\n1,c,3,5\n"
    found = ratings(write(text))
    assert interactions(found) == [("1", "a", 5.0, 30), ("1", "b", 1.0, 20), ("1", "c", 3.0, 5)]
    split = leave_one_out(found, by_column(found.columns, column="user"), negatives=0, min_items=3)
    order = [split.examples(0, name)["item"][0].item() for name in ("train", "validation", "test")]
    assert [split.names["item"][item] for item in order] == ["c", "b", "a"]
    assert split.names["user"] == ("1",)


def test_lower_ratings_are_left_out_before_duplicates_with_whom_has_no_other(write):
    text = "1,a,5,30\n1,b,1,20\n2,d,2,10\n1,b,4,40\n3,c,3.3,5\n"
    found = ratings(write(text), min_rating=3.3)
    assert interactions(found) == [("1", "a", 5.0, 30), ("1", "b", 4.0, 40), ("3", "c", pytest.approx(3.3), 5)]
    assert found.names == {"user": ("1", "3"), "item": ("a", "b", "c")}
    assert found.notes == ("3 of 5 interactions: 2 are rated below min_rating = 3.3",)


def test_what_is_left_out_is_noted_and_nothing_where_nothing_is(write):
    columns = ("user", "item", "rating")
    path = write("1,a,5\n1,b,1\n1,a,4\n2,a,4\n2,a,1\n1,a,3\n")
    repeated = "6 interactions: 3 repeat one that is there already"  # a of 1 in lines 3 and 6, a of 2 in line 5
    assert ratings(path, columns).notes == (f"3 of {repeated}",)
    assert ratings(path, columns, min_rating=1).notes == (f"3 of {repeated}",)
    assert ratings(path, columns, min_rating=4).notes == (
        "3 of 6 interactions: 3 are rated below min_rating = 4",
        "2 of 3 interactions: 1 repeats one that is there already",
    )
    assert ratings(write("1,a,5\n1,b,1\n"), columns, min_rating=1).notes == ()


def test_notes_go_with_the_data_whoever_divides_it(write):
    found = ratings(write("1,a\n1,a\n2,a\n"), columns=("user", "item"))
    assert divide(found, by_column(found.columns, column="user")).notes == found.notes != ()


def test_times_are_whole_where_all_are_and_keep_their_fractions_otherwise(write):
    def times(*cells):
        lines = [f"1,{number},{cell}\n" for number, cell in enumerate(cells)]
        return ratings(write("".join(lines)), columns=("user", "item", "time")).columns["time"]

    exact = times("1700000000000000001", "1700000000000000002", "-5")
    assert exact.dtype == torch.int64 and exact.tolist() == [1700000000000000001, 1700000000000000002, -5]
    assert times("964982703.0", "1e9").tolist() == [964982703, 10**9] and times("1.0").dtype == torch.int64
    part = times("964982703", "964982703.25")
    assert part.dtype == torch.float64 and part.tolist() == [964982703, 964982703.25]
    later = times(*["5"] * BLOCK, "5.5")
    assert later.dtype == torch.float64 and later[-2:].tolist() == [5, 5.5], "in whichever part of a long file"


def test_more_lines_than_are_held_at_once_are_read_as_a_plain_loop_would(write):
    random = np.random.default_rng(0)
    rows = [
        (f"u{random.integers(40)}", f"{random.integers(50) * 7}", str(random.integers(1, 6)), str(place))
        for place in range(3 * BLOCK + 5)
    ]
    first = {}
    for user, item, rating, time in rows:
        first.setdefault((user, item), (user, item, float(rating), int(time)))
    found = ratings(write(joined("::", rows)), delimiter="::")
    assert interactions(found) == list(first.values())
    assert found.names["item"] == tuple(sorted({row[1] for row in rows}, key=int))


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(write, text):
    with pytest.raises(ValueError, match=r"mine\.csv is empty"):
        ratings(write(text))
    with pytest.raises(ValueError, match=r"mine\.csv has no interactions, only a header"):
        ratings(write("user,item\n" + text), header=True)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="path must be a file, .* is a folder"):
        ratings(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"path must be a file, there is no .*nowhere\.csv"):
        ratings(tmp_path / "nowhere.csv")


LONG = "1,a,5,9\n" * (BLOCK + 1)
TIME = "expected a number, such as seconds since 1970 (Unix time; no dates)"


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("1,a,5,9\n\n2,b,4\n", {}, "line 3: 3 columns with delimiter ',', expected 4, among them user, item, rating"),
        ("1,a,5,9\n2,b,4,9,0\n", {}, "line 2: 5 columns with delimiter ',', expected 4"),
        ("1::a::5::9\n", {}, "line 1: 1 columns with delimiter ',', expected 4"),
        ("user,item,tag\n1,a\n", {"header": True}, "line 2: 2 columns with delimiter ',', expected 3"),
        (LONG + "2,b,4\n", {}, f"line {BLOCK + 2}: 3 columns"),
        ("1,a,5,9\n2,b,good,9\n", {}, "line 2, column rating: expected a number, got 'good'"),
        ("1,a,5,9\n2,b,nan,9\n", {}, "line 2, column rating: expected a number, got 'nan'"),
        ("1,a,,9\n", {}, "line 1, column rating: expected a number, got ''"),
        ("1;a;4,5;9\n", {"delimiter": ";"}, "line 1, column rating: expected a number, got '4,5'"),
        ("1,a,inf,9\n", {}, "line 1, column rating: expected a number, got 'inf'"),
        ("1,a,5,9\n2,b,-1e300,9\n", {}, "line 2, column rating: expected a number of at most 3.4e+38, got '-1e300'"),
        ("1,a,5,9\n\n\n2,b,5,2024-01-01\n", {}, f"line 4, column time: {TIME}, got '2024-01-01'"),
        ("1,a,5,NaN\n", {}, f"line 1, column time: {TIME}, got 'NaN'"),
        (LONG + "2,b,5,x\n", {}, f"line {BLOCK + 2}, column time: {TIME}, got 'x'"),
        ("1,a,5,2024-01-01T00:00:00Z\n", {}, f"line 1, column time: {TIME}, got '2024-01-01T00:00:00Z'; if"),
        ("1,a,5,9\n, b,5,9\n", {}, "line 2, column user: expected an id, got ''"),
        ("1,a,5,9\n2,  ,5,9\n", {}, "line 2, column item: expected an id, got ''"),
        (
            "userId,movieId,rating,timestamp\n1,a,5,9\n",
            {},
            "line 1, column rating: expected a number, got 'rating'; if",
        ),
        ('1,a,5,9\n2,"b,5,9\n3,c,5,9\n', {}, "line 2: a quote begins that does not end on the line"),
        ('1,a,5,9\n2,"b\nc",5,9\n', {}, "line 2: a quote begins that does not end on the line"),
        ('1,a,5,9\n2,b,5,"9', {}, "line 2: a quote begins that does not end on the line"),
        ('1,a,5,9\n2,"b"c,5,9\n', {}, "line 2: ',' expected after '\"'"),
        ("1,a,2,9\n2,b,3,9\n", {"min_rating": 4}, "no rating is at least min_rating = 4, the highest is 3.0"),
    ],
)
def test_a_wrong_line_is_told_with_its_number_its_cell_and_what_is_expected(write, text, settings, message):
    with pytest.raises(ValueError, match=rf"mine\.csv(, |: ){re.escape(message)}"):
        ratings(write(text), **settings)


@pytest.mark.parametrize(
    ("columns", "header", "message"),
    [
        (("user", "rating"), False, "columns must have 'user' and 'item', and may have 'rating' and 'time', each once"),
        (("user", "item", "film"), False, r"columns must have .* and '-' for what is passed over, got \(.*'film'\)"),
        (("user", "item", "user"), False, "columns must have"),
        ({"user": "userId"}, True, "columns must have .*got {'user': 'userId'}"),
        ({"user": "userId", "item": "film", "stars": "rating"}, True, "columns must have"),
        (
            {"user": "userId", "item": "film"},
            True,
            "line 1: the header has no column 'film' for the item, but userId, ",
        ),
        ({"user": "userId", "item": "tag"}, True, "line 1: the header has 2 column 'tag' for the item"),
        (None, True, "line 1: the header has no column 'user' for the user, but userId, rating, tag, tag: say what it"),
        ({"user": "userId", "item": "tag"}, False, "is what a header calls them: it needs header = true"),
        (("user", "item", "rating", "-"), True, "line 1: the header has 'rating' where columns = .* has 'item'"),
    ],
)
def test_columns_that_are_unknown_missing_or_against_the_header_are_refused(write, columns, header, message):
    with pytest.raises(ValueError, match=message):
        ratings(write("userId,rating,tag,tag\n1,2,3,4\n"), columns, header)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delimiter": ""}, "delimiter must be a text without quotes and ends of lines, such as ',', got ''"),
        ({"delimiter": '"'}, "delimiter must be"),
        ({"encoding": "latin-0"}, "encoding must be one that Python knows, such as .*, got 'latin-0'"),
        ({"encoding": "base64"}, "encoding must be one that Python knows"),
        ({"columns": ("user", "item", "-", "-"), "min_rating": 3}, "min_rating = 3 needs a column 'rating', there are"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(write, settings, message):
    with pytest.raises(ValueError, match=message):
        ratings(write(joined(",")), **settings)


@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_that_is_not_of_the_encoding_is_told_with_its_place_and_the_remedy(write, packed):
    content = LONG.encode() + b"2,caf\xe9,4,9\n"
    path = write(gzip.compress(content) if packed else content)
    place = len(LONG) + 5
    with pytest.raises(ValueError, match=rf"line {BLOCK + 2}: byte 0xe9 at place {place} is not utf-8: .*'latin-1'"):
        ratings(path)
    assert ratings(path, encoding="latin-1").names["item"] == ("a", "café")
    with pytest.raises(ValueError, match="line 1: byte 0xff at place 0 is not utf-8"):
        ratings(write("1,2\n".encode("utf-16")))


# In an experiment, and as the publishers' files.

EXPERIMENT = """
name = "mine"
rounds = 1

[data]
use = "fedsim.data.ratings:ratings"
path = "mine.csv"
columns = {columns}
header = {header}
min_rating = 2

[partition]
use = "fedsim.data.partition:by_column"
column = "user"

[split]
use = "fedsim.ranking:leave_one_out"
negatives = 5

[model]
use = "clients.mostpop:nothing"

[strategy]
use = "strategies.mostpop:MostPop"

[clients.train]
use = "clients.mostpop:TellItems"

[clients.evaluate]
use = "fedsim.ranking:RankItems"
scorer = {{ use = "clients.mostpop:Popularity" }}
"""


@pytest.mark.parametrize(
    ("columns", "first"),
    [('["user", "item", "rating"]', ""), ('{ user = "who", item = "what", rating = "stars" }', "what,who,stars\n")],
)
def test_an_experiment_with_a_file_of_ones_own_is_described(write, columns, first):
    swapped = bool(first)
    rows = [(f"u{user}", f"$item_{(5 * user + step) % 20}$", "5") for user in range(4) for step in range(8)]
    rows = [(item, user, rating) if swapped else (user, item, rating) for user, item, rating in rows]
    write(first + joined(",", rows))
    path = write(EXPERIMENT.format(columns=columns, header="true" if swapped else "false"), "mine.toml")
    told, drawn = doctor.partition(str(path), [], "item", path.parent / "items.svg")
    assert dict(told)["clients"] == "4" and dict(told)["test examples"] == f"{4 * (1 + 5 + 7)} (13 a client)"
    assert "item = $item_10$" in dict(told) and drawn.is_file()
    parts = assemble(*read(str(path)))
    parts.engine.close()
    assert parts.federation.names["user"] == ("u0", "u1", "u2", "u3")


@pytest.fixture
def mine(write):
    """An experiment with users of 9, 8, 8 and 8 of 20 items and one of 3; two lines repeat, and one is rated 1."""
    rows = [(f"u{user}", str((5 * user + step) % 20), "5") for user in range(4) for step in range(8)]
    rows += [("u0", "8", "5"), *(("u4", item, "5") for item in "012"), rows[0], rows[9], ("u1", "low", "1")]
    write(joined(",", rows))
    return write(EXPERIMENT.format(columns='["user", "item", "rating"]', header="false"), "mine.toml")


NOTES = [
    "38 of 39 interactions: 1 is rated below min_rating = 2.0",
    "36 of 38 interactions: 2 repeat one that is there already",
    "4 of 5 users: 1 has fewer than min_items = 5 different items",
]


def test_recommendation_is_described_by_interactions_and_what_was_left_out(mine):
    told, drawn = doctor.partition(str(mine), [], None, mine.parent / "interactions.png")
    assert told == [
        ("users", "4"),
        ("items", "20"),
        ("interactions", "33, 25 of them to train on"),  # 9 + 3 * 8, less two held out of each user
        ("density", "41.250%"),  # 33 / (4 * 20)
        ("items of a user", "8 at least, 8 in the median, 9 at most"),
        ("users with a validation item", "4"),
        ("users with a test item", "4"),
        *(("data", note) for note in NOTES),
    ]
    assert drawn is not None and drawn.read_bytes().startswith(b"\x89PNG")
    without = dict(doctor.partition(str(mine), ["split.validation=false"], None, None)[0])
    assert without["interactions"] == "33, 29 of them to train on" and without["users with a validation item"] == "0"
    with pytest.raises(ValueError, match="column 'y' must hold one integer from 0 for each example, got -1"):
        doctor.partition(str(mine), [], "y", None)


def test_a_run_and_its_report_tell_what_was_left_out(mine):
    shown = []

    class Screen(Silent):
        def warn(self, told):
            shown.append(told)

    def show(label, rounds, done):
        return Screen()

    path = run(str(mine), root=mine.parent / "runs", display=show).path
    assert json.loads((path / "environment.json").read_text())["notes"] == shown == NOTES
    assert f"| data | {'; '.join(NOTES)} |" in (path / "report" / "summary.md").read_text()
    resume(path, rounds=2, display=show)
    assert shown == NOTES, "and not once more"


def test_names_of_any_kind_are_drawn(write, tmp_path):
    rows = [("1", item) for item in ("$", "a$b$c", r"$\frac$", "_hidden", "x" * 200, "<b>", "100%")]
    found = ratings(write(joined("\t", rows)), columns=("user", "item"), delimiter="\t")
    split = leave_one_out(found, by_column(found.columns, column="user"), negatives=0)
    assert (split.examples(0, "train")["y"] == WANTED).all()
    draw(describe(split, "item"), tmp_path / "items.svg")
    told = re.findall("<!-- (.*) -->", (tmp_path / "items.svg").read_text())
    assert {"$", "a$b$c", r"$\frac$", "_hidden", "x" * 39 + "…"} <= set(told)


def test_the_catalogue_says_that_the_file_is_yours():
    assert CATALOGUE["ratings"] is ratings
    assert {name: where for name, where, _ in doctor.data_sets()}["ratings"] == "yours"
    assert doctor.fetch("ratings") == "reads a file of yours, path"
    assert doctor.fetch("latent_factor_ratings") == "needs no files"


@pytest.mark.parametrize(
    ("loader", "place", "settings"),
    [
        (movielens_100k, "movielens-100k/u.data", {"delimiter": "\t"}),
        (filmtrust, "filmtrust/ratings.txt", {"delimiter": " ", "columns": ("user", "item", "rating")}),
    ],
)
def test_the_publishers_files_are_read_as_their_own_loaders_read_them(loader, place, settings):
    folder = os.environ.get("FEDSIM_DATA")
    path = next((p for end in ("", ".gz") if folder and (p := Path(folder) / f"{place}{end}").is_file()), None)
    if path is None:
        pytest.skip(f"FEDSIM_DATA names no folder with {place}")
    own, general = loader(), ratings(path, **settings)
    assert own.columns.keys() == general.columns.keys()
    assert all(torch.equal(own.columns[name], general.columns[name]) for name in own.columns)
