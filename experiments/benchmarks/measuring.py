"""What the processes of a benchmark measure about themselves, and how such a process is started. Needs Linux's /proc.

All processes that descend from the one that compares are counted: drivers, workers and daemons. It starts one
contestant at a time, and is not counted itself.
"""

import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
STARTER, STARTED = "BENCHMARK_STARTER", "BENCHMARK_STARTED"  # who started this process, and when
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
# Else it depends on what was freed before whether memory goes back to the system: a tenth of the CNN's time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


class Clock:
    """Told of the end of every round, of the start as round 0; measures what comes after the first rounds."""

    def __init__(self, rounds: int, warm_up: int) -> None:
        self.rounds, self.warm_up = rounds, warm_up
        self.start = self.end = 0.0
        self.walls: list[float] = []
        self.memory: dict[str, float] = {}

    def __call__(self, round: int) -> None:
        if round == self.warm_up:
            self.start = others() + time.process_time()  # in this order, and the other way round at the end, so that
        if round == self.rounds:
            self.end = time.process_time() + others()  # what it takes to find the processes is not counted
        self.walls.append(time.monotonic())
        if round == self.rounds:
            self.memory = memory()

    def measured(self) -> dict[str, float]:
        """Seconds a round, CPU time of all processes on average and wall time as the median; start-up; memory."""
        walls = [after - before for before, after in pairwise(self.walls[self.warm_up :])]
        return {
            "cpu": (self.end - self.start) / (self.rounds - self.warm_up),
            "wall": statistics.median(walls),
            "start_up": self.walls[1] - float(os.environ[STARTED]),  # from the process's start to the first round's end
        } | self.memory


class Watch:
    """Looks how much memory a contestant has, all its processes together."""

    peak = 0.0  # MB

    def __call__(self) -> None:
        self.peak = max(self.peak, sum(map(share, relatives(os.getpid()))))


def relatives(starter: int) -> dict[int, float]:
    """CPU seconds of a contestant's processes and of those that they have waited for; of this one only the latter."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        fields = text.rpartition(")")[2].split()  # what stands before is the name, which may hold anything
        process, parent = int(stat.parent.name), int(fields[1])
        own = process == os.getpid()
        ticks[process] = sum(map(int, fields[13:15] if own else fields[11:15]))  # of itself: those it has waited for
        children[parent].append(process)
    found = list(children[starter])
    for process in found:  # which grows meanwhile
        found += children[process]
    return {process: ticks[process] / os.sysconf("SC_CLK_TCK") for process in found}


def others() -> float:
    """CPU seconds of all processes of this contestant but this one."""
    return sum(relatives(int(os.environ[STARTER])).values())


def memory() -> dict[str, float]:
    """MB: the largest that this process was, and any other of this contestant; what all have now together."""
    found = list(relatives(int(os.environ[STARTER])))
    peaks = {process: _megabytes(Path(f"/proc/{process}/status"), "VmHWM:") for process in found}
    return {"driver": peaks.pop(os.getpid()), "worker": max(peaks.values(), default=0.0), "all": sum(map(share, found))}


def share(process: int) -> float:
    """MB that a process has now; of those that it shares with others, its part."""
    return _megabytes(Path(f"/proc/{process}/smaps_rollup"), "Pss:")


def _megabytes(file: Path, name: str) -> float:
    try:
        lines = file.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0.0
    return next((float(line.split()[1]) / 1_000 for line in lines if line.startswith(name)), 0.0)


def start(command: Sequence[str], folder: Path, watch: Watch | None = None, **settings: str) -> None:
    """Runs a contestant to its end, and looks at it meanwhile; where it fails, this process ends with what it said."""
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    told = {STARTER: str(os.getpid()), STARTED: str(time.monotonic()), "FLWR_HOME": str(folder / "flwr")}
    environment = inherited | ENVIRONMENT | told | settings
    with (folder / "output.txt").open("w+") as output:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
            while watch is not None and process.poll() is None:
                watch()
                time.sleep(0.1)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{output.read()[-4_000:]}")


def check_system() -> None:
    """Ends this process where nothing can be measured."""
    if not Path("/proc/self/stat").exists():
        sys.exit("CPU time of other processes is read from /proc, which this system does not have")


def spread(values: Sequence[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
