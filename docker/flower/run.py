"""Runs an experiment on Flower's nodes, as `fedsim run` does in one process, and ends as the run does.

    python run.py fedavg/digits --set rounds=20 --seeds 0 1 2

Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import tomli_w
from connection import connect, flwr

from fedsim.apps import source
from fedsim.config import ConfigError, bundled, locate, read, resolve, variants

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
    words = [word for place, word in enumerate(words) if place > 1 or word != "run"]  # as for `fedsim`
    for word in words:
        if reason := REFUSED.get(word.partition("=")[0]):
            raise ConfigError(f"{word}: {reason}")
    parser = argparse.ArgumentParser(prog="run", description="Runs an experiment on Flower's nodes.")
    parser.add_argument("--insecure", action="store_true", help="the SuperLink speaks without TLS")
    parser.add_argument("experiment", help="the name of a bundled experiment, or a TOML file")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="one run for each of these seeds")
    return parser.parse_args(words)


def plan(experiment: str, changes: list[str], seeds: list[int]) -> tuple[str, list[list[str]]]:
    """What the nodes are told to run, which is a file's content where they lack the file, and the changes of each run.

    Raises:
        ConfigError: something is wrong with it, or the nodes could not do it.
    """
    found = variants(experiment, changes)
    name = experiment if experiment in bundled() else locate(experiment).read_text(encoding="utf-8")
    runs = [[*variant, *seed] for variant in found for seed in [[f"seed={number}"] for number in seeds] or [[]]]
    for change in (change for run in runs for change in run):
        if ";" in change:
            raise ConfigError(f"--set {change}: a semicolon separates changes on their way to the nodes")
    for run in runs:
        resolve(*read(source(name), run))
    return name, runs


def follow(name: str, changes: list[str]) -> bool:
    """Starts a run, shows its log, and says whether it came to a good end."""
    config = Path(os.environ["FLWR_HOME"], "run.toml")  # on the command line, Flower takes no quotes within a value
    config.write_text(tomli_w.dumps({"experiment": name, "set": "; ".join(changes), "out": RUNS}))
    started = json.loads(flwr("run", APP, "--run-config", config, "--format", "json"))["run-id"]
    status = ""
    try:
        while not status.startswith("finished"):  # a log may break off
            subprocess.run(["flwr", "log", started, "--stream"], check=False)
            (run,) = json.loads(flwr("list", "--run-id", started, "--format", "json"))["runs"]
            status = run["status"]
    except KeyboardInterrupt:
        flwr("stop", started)
        raise
    if status != "finished:completed":
        print(f"The run failed: Flower calls it {status}", file=sys.stderr)
    return status == "finished:completed"


def main() -> int:
    """The command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `docker stop` is an interruption, too
    try:
        words = asked(sys.argv[1:])
        name, runs = plan(words.experiment, words.changes, words.seeds)
        connect(words.insecure)
        return 0 if all([follow(name, changes) for changes in runs]) else 1
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
