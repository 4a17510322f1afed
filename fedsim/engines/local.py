"""The engines of this process: clients one by one, clients all at once, and the rule that picks one of the two."""

from collections.abc import Mapping

from torch import nn

from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.sequential import Sequential
from fedsim.engines.vectorised import Vectorised
from fedsim.ranges import Natural

__all__ = ["Sequential", "Vectorised", "auto"]

# Above this size, and for convolutions, vmap on a CPU is slower than a loop.
VECTORISED_PARAMETERS = 500_000


def auto(
    federation: Federation, clients: Mapping[str, Client], seed: Natural = 0, device: str = "cpu"
) -> Sequential | Vectorised:
    """`Vectorised` where that is cheaper, else `Sequential`.

    The rule reads the device and the clients' models (layers, number of parameters) and no clock, so an experiment runs
    the same way on every machine. On a CPU: vectorised unless a client overrides `run`, a model has a convolution, or
    it has more than VECTORISED_PARAMETERS parameters. On a GPU: vectorised unless a client overrides `run`. Without any
    client there is nothing to vectorise.
    """
    return kind(clients, device)(federation, clients, seed, device=device)


def kind(clients: Mapping[str, Client], device: str) -> type[Sequential] | type[Vectorised]:
    """Which of the two `auto` takes."""
    usual = [client for client in clients.values() if type(client).run_cohort is Client.run_cohort]
    modules = [module for client in usual if (module := _module(client)) is not None]
    slow = any(isinstance(part, nn.modules.conv._ConvNd) for module in modules for part in module.modules())
    large = any(sum(p.numel() for p in module.parameters()) > VECTORISED_PARAMETERS for module in modules)
    alone = any(type(client).run is not Client.run for client in clients.values())
    costly = (slow or large) and device == "cpu"
    return Sequential if costly or alone or not clients else Vectorised


def _module(client: Client) -> nn.Module | None:
    return getattr(getattr(client, "model", None), "module", None)
