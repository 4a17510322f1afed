"""What the run's configuration names: an experiment that nodes have, or all of one that they lack."""

from pathlib import Path

import pytest
import torch

from fedsim.apps import site, source
from fedsim.config import ConfigError, read

TEXT = (Path(__file__).parents[2] / "experiments" / "fedavg" / "digits.toml").read_text(encoding="utf-8")


def test_what_has_several_lines_is_an_experiment_and_all_else_its_name():
    assert source("fedavg/digits") == "fedavg/digits"
    named, told = read(source("fedavg/digits"), ["rounds=3"]), read(source(TEXT), ["rounds=3"])
    assert named[0] == told[0] and told[0].rounds == 3
    with pytest.raises(ConfigError, match="experiment is not TOML: Invalid value"):
        source("rounds = 3\nname =")


def test_a_node_has_the_same_data_and_clients_by_either():
    named, told = site("fedavg/digits", ()), site(TEXT, ())
    assert named.clients.keys() == told.clients.keys() and named.federation.num_clients == told.federation.num_clients
    for name, column in named.federation.columns.items():
        assert torch.equal(column, told.federation.columns[name])
