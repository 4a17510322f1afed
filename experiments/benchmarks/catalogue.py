"""What a large catalogue costs: FedRecGEL with 1,000,000 items, 1,000 of 10,000 users a round, both radii 0.02.

Each user has 10 to 90 generated items. The tables have 160 numbers an item, and the server's Adam, which is dense, two
more for each of them. Prints the median CPU and wall time of a round, on one thread, and the most memory that the
process had.
"""

import resource
import statistics
import time

import numpy as np
import torch

from clients.fedrecgel import DualSam
from clients.ncf import scorer
from fedsim.data.federation import Federation
from fedsim.engines.local import auto
from fedsim.sampling import uniform
from fedsim.simulation import begin, rounds
from strategies.fedrecgel import FedRecGel

ITEMS, USERS, COHORT, REPEATS = 1_000_000, 10_000, 1_000, 5


def build() -> Federation:
    """Users with some items each."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 91, USERS)
    item = torch.from_numpy(np.concatenate([rng.choice(ITEMS, size, replace=False) for size in sizes]))
    ends = np.cumsum(sizes)
    return Federation(
        {"item": item, "y": torch.ones_like(item)}, np.arange(len(item)), np.c_[ends - sizes, ends, ends, ends]
    )


def main() -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    data, model, strategy = build(), scorer(ITEMS), FedRecGel()
    clients = {"train": DualSam(model=model, lr=0.1)}
    snapshot = begin(strategy, model.params, clients, USERS, 1)
    model.release()  # as a run does
    run = rounds(strategy, auto(data, clients, 1), uniform(USERS, 1, count=COHORT), snapshot)
    cpu, wall = [], []
    for number in range(REPEATS + 1):
        start = time.process_time(), time.perf_counter()
        next(run)
        if number:  # the first warms up
            cpu.append(time.process_time() - start[0])
            wall.append(time.perf_counter() - start[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{ITEMS:,} items, {COHORT:,} users a round, {sum(p.numel() for p in model.module.parameters()):,} parameters"
    )
    print(f"a round: CPU {statistics.median(cpu):.2f} s, wall {statistics.median(wall):.2f} s; at most {peak:.2f} GB")


if __name__ == "__main__":
    main()
