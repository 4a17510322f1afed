"""The publishers' files: where they are, and the checksums of the ones that fedsim was tested with."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A publisher's files."""

    folder: str
    url: str  # a zip archive that holds all files; or each file's own address, with {name} for its name
    sha256: Mapping[str, str]  # file -> checksum of its uncompressed content
    columns: tuple[str, ...] = ()  # the only columns of a CSV file that are kept; (): the whole file


ADULT = Source(
    "adult",
    "https://archive.ics.uci.edu/static/public/2/adult.zip",
    {
        "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
        "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
    },
)
# The publisher's file also has names, birth dates and case numbers, which fedsim never keeps, nor any column that it
# does not use. The checksum is therefore that of the columns below alone, in the form that `_only` writes, computed
# from a copy without the personal columns.
COMPAS = Source(
    "compas",
    "https://raw.githubusercontent.com/propublica/compas-analysis/master/{name}",
    {"compas-scores-two-years.csv": "252243a99648c02edc121021ac1dfc4721f43221e79a6f303f40597e64bcce89"},
    (
        "sex",
        "age",
        "race",
        "decile_score",
        "priors_count",
        "days_b_screening_arrest",
        "c_charge_degree",
        "is_recid",
        "score_text",
        "two_year_recid",
    ),
)
DRUG_CONSUMPTION = Source(
    "drug-consumption",
    "https://archive.ics.uci.edu/static/public/373/drug+consumption+quantified.zip",
    {"drug_consumption.data": "90b8cf500b07ad455baf9fe1dc519998c75a1df6d87f6bd7069176f0826ea8c1"},
)
FASHION_MNIST = Source(
    "fashion-mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}.gz",
    {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)
MOVIELENS_100K = Source(
    "movielens-100k",
    "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    {"u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"},
)
FILMTRUST = Source(
    "filmtrust",
    "https://guoguibing.github.io/librec/datasets/filmtrust.zip",
    {"ratings.txt": "241167424e24d588e8871d68641e94ead98d5b3a4f0db01ef3181a74ad35e7a1"},
)


SOURCES = {  # by the name of the loader
    "adult": ADULT,
    "compas": COMPAS,
    "drug_consumption": DRUG_CONSUMPTION,
    "fashion_mnist": FASHION_MNIST,
    "movielens_100k": MOVIELENS_100K,
    "filmtrust": FILMTRUST,
}
