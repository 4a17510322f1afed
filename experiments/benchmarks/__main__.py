"""Runs the benchmarks that are named, or all of them, each in a process of its own."""

import subprocess
import sys

BENCHMARKS = ("population", "memory", "packing", "recommendation", "catalogue", "systems")


def main() -> None:
    """`python -m experiments.benchmarks [NAME ...]`."""
    names = sys.argv[1:] or BENCHMARKS
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"experiments.benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
