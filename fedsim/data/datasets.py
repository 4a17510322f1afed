"""The catalogue of data sets: bundled, generated, in a folder of yours or fetched with a checksum."""

from collections.abc import Callable

from fedsim.data.dataset import Dataset
from fedsim.data.generated import (
    canonical_joint,
    canonical_table,
    gaussian_task,
    gaussians,
    group_shift,
    latent_factor_ratings,
    random_joint,
)
from fedsim.data.images import digits, fashion_mnist
from fedsim.data.ratings import filmtrust, movielens_100k, ratings
from fedsim.data.tabular import adult, compas, drug_consumption

__all__ = [
    "CATALOGUE",
    "adult",
    "canonical_joint",
    "canonical_table",
    "compas",
    "digits",
    "drug_consumption",
    "fashion_mnist",
    "filmtrust",
    "gaussian_task",
    "gaussians",
    "group_shift",
    "latent_factor_ratings",
    "movielens_100k",
    "random_joint",
    "ratings",
]

CATALOGUE: dict[str, Callable[..., Dataset]] = {
    "adult": adult,
    "compas": compas,
    "drug_consumption": drug_consumption,
    "fashion_mnist": fashion_mnist,
    "movielens_100k": movielens_100k,
    "filmtrust": filmtrust,
    "ratings": ratings,
    "digits": digits,
    "gaussians": gaussians,
    "gaussian_task": gaussian_task,
    "canonical_joint": canonical_joint,
    "group_shift": group_shift,
    "latent_factor_ratings": latent_factor_ratings,
}
