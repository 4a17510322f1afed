"""What forgetting cost: rounds, epochs of clients, bytes and seconds, as a run's metrics tell."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.task import Metrics

KNOWN = frozenset({"test", "clients", "evaluate"})  # parts of metrics that are no action


def action(line: Metrics) -> str | None:
    """What the clients were asked in a round: metrics are called after it, "forget/loss"."""
    names = {name.partition("/")[0] for name in line if "/" in name} - KNOWN
    return min(names) if names else None


def spent(metrics: Sequence[Metrics], clients: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, float]:
    """What all rounds together cost but those of the actions `without`.

    Args:
        metrics: of each round.
        clients: action -> the table of its client, whose epochs count.
        without: what was there before.
    """
    found = dict.fromkeys(("rounds", "client_epochs", "bytes", "seconds"), 0.0)
    doing = None
    for line in metrics:
        doing = action(line) or doing
        if doing in without:
            continue
        found["rounds"] += 1
        found["client_epochs"] += line.get("clients", 0) * epochs(clients.get(doing or "", {}))
        found["bytes"] += line.get("bytes_down", 0) + line.get("bytes_up", 0)
        found["seconds"] += line.get("seconds", 0)
    return found


def epochs(client: Mapping[str, Any]) -> int:
    """How often a client goes through its examples in a round: as its table says, or that of a client inside it."""
    inner = [value for value in client.values() if isinstance(value, Mapping) and "use" in value]
    return int(client.get("epochs", max(map(epochs, inner), default=1)))
