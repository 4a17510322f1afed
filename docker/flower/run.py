"""Runs an experiment on Flower's nodes, as `fedsim run` does in one process, and ends as the run does.

    python run.py fedavg/digits --set rounds=20 --seeds 0 1 2

Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from connection import connect, flwr

from fedsim.config import ConfigError, bundled, read, resolve, variants

APP = Path(__file__).parent / "app"
RUNS = "/home/fedsim/runs"  # in the SuperLink's container, where the server's side of a run is
REFUSED = {
    "resume": "a run on Flower's nodes is not resumed: what clients keep to themselves is on their nodes",
    "--out": "runs go to the volume of runs",
    "--tracker": "the SuperLink's network has no way out to a tracker",
    "--flower-app": "the nodes run experiments of fedsim; `flwr run` starts other apps",
    "--num-nodes": "there are as many nodes as the variable NODES says",
}


def asked(words: list[str]) -> argparse.Namespace:
    """What is to be run.

    Raises:
        ConfigError: an argument of `fedsim run` that has no meaning here.
    """
    words = words[1:] if words[:1] == ["run"] else words
    for word in words:
        if reason := REFUSED.get(word.partition("=")[0]):
            raise ConfigError(f"{word}: {reason}")
    parser = argparse.ArgumentParser(prog="run", description="Runs an experiment on Flower's nodes.")
    parser.add_argument("--insecure", action="store_true", help="the SuperLink speaks without TLS")
    parser.add_argument("experiment", help="the name of a bundled experiment")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="one run for each of these seeds")
    return parser.parse_args(words)


def plan(experiment: str, changes: list[str], seeds: list[int]) -> list[list[str]]:
    """The changes that make each run.

    Raises:
        ConfigError: one of them is wrong, or the nodes could not do it.
    """
    if experiment not in bundled():
        raise ConfigError(f"{experiment} is no bundled experiment (`fedsim list` shows those), so the nodes lack it")
    runs = [
        [*variant, *seed] for variant in variants(experiment, changes) for seed in [[f"seed={n}"] for n in seeds] or [[]]
    ]
    for change in (change for run in runs for change in run):
        if ";" in change:
            raise ConfigError(f"--set {change}: a semicolon separates changes on their way to the nodes")
    for run in runs:
        resolve(*read(experiment, run))
    return runs


def follow(experiment: str, changes: list[str]) -> bool:
    """Starts a run, shows its log, and says whether it came to a good end."""
    config = {"experiment": experiment, "set": "; ".join(changes), "out": RUNS}
    words = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    started = json.loads(flwr("run", APP, "--run-config", words, "--format", "json"))["run-id"]
    try:
        subprocess.run(["flwr", "log", started, "--stream"], check=False)
        (run,) = json.loads(flwr("list", "--run-id", started, "--format", "json"))["runs"]
    except KeyboardInterrupt:
        flwr("stop", started)
        raise
    if run["status"] != "finished:completed":
        print(f"The run failed: Flower calls it {run['status']}", file=sys.stderr)
    return bool(run["status"] == "finished:completed")


def main() -> int:
    """The command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `docker stop` is an interruption, too
    try:
        words = asked(sys.argv[1:])
        runs = plan(words.experiment, words.changes, words.seeds)
        connect(words.insecure)
        return 0 if all([follow(words.experiment, changes) for changes in runs]) else 1
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"The run failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
