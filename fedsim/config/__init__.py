"""From an experiment file to the objects of a simulation.

One rule: a table with `use` names a callable, its other keys are that callable's arguments. Keys are checked against
the callable's signature and types before anything starts. Arguments that an experiment need not state because it has
them anyway (the model, the federation, the seed, ...) are filled in by name.
"""

from fedsim.config.assembly import Assembly, Supplies, assemble, resolve, supply
from fedsim.config.experiment import PARTS, Experiment, assignment, bundled, locate, read
from fedsim.config.plugins import ConfigError, find, fingerprints, names
from fedsim.config.recipe import Recipe, recipe
from fedsim.config.sweep import setting, variants

__all__ = [
    "PARTS",
    "Assembly",
    "ConfigError",
    "Experiment",
    "Recipe",
    "Supplies",
    "assemble",
    "assignment",
    "bundled",
    "find",
    "fingerprints",
    "locate",
    "names",
    "read",
    "recipe",
    "resolve",
    "setting",
    "supply",
    "variants",
]
