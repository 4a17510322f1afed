"""What a registered client costs: 1,000,000 of them beside 10,000, 1,000 sampled a round, logistic regression.

Every client has 10 generated examples of 10 features. Prints how long the federation takes to build, the memory that
the process holds, and the median time of a round at both sizes, measured in turns.
"""

import gc
import resource
import statistics
import time
from collections.abc import Iterator

import torch

from clients.sgd import Sgd
from fedsim.data.datasets import gaussians
from fedsim.data.federation import Federation, divide
from fedsim.data.partition import iid
from fedsim.engines.local import auto
from fedsim.networks import logistic
from fedsim.sampling import uniform
from fedsim.simulation import Round, begin, rounds
from strategies.fedavg import FedAvg

EACH, FEATURES, COHORT, REPEATS = 10, 10, 1_000, 15


def build(clients: int) -> Federation:
    """A federation of so many clients."""
    dataset = gaussians(clients * EACH, features=FEATURES, classes=2, test=0.0)
    return divide(dataset, iid(dataset.columns, 0, clients))


def simulate(federation: Federation) -> Iterator[Round]:
    """Rounds of FedAvg with 1,000 sampled clients."""
    model = logistic(federation)
    clients = {"train": Sgd(model, lr=0.1, batch_size=EACH)}
    engine = auto(federation, clients)
    sample = uniform(federation.num_clients, count=COHORT)
    return rounds(FedAvg(), engine, sample, begin(FedAvg(), model.params, clients, federation.num_clients))


def main() -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    large = build(1_000_000)
    built = time.perf_counter() - start
    gc.collect()
    runs = {size: simulate(federation) for size, federation in ((10_000, build(10_000)), (1_000_000, large))}
    times: dict[int, list[float]] = {size: [] for size in runs}
    for repeat in range(REPEATS + 3):
        for size, run in runs.items():
            start = time.perf_counter()
            next(run)
            if repeat >= 3:  # the first rounds warm up
                times[size].append(time.perf_counter() - start)
    ratios = [many / few for few, many in zip(*times.values(), strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"federation of 1,000,000 clients, 10,000,000 examples: built in {built:.1f} s")
    print(f"peak resident memory: {peak:.2f} GiB")
    for size, seconds in times.items():
        print(f"round with {COHORT:,} of {size:,} clients: median {statistics.median(seconds) * 1000:.1f} ms")
    print(f"ratio: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
