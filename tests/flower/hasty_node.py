"""Flower's program for a node, with shorter waits: it looks for work ten times as often, and is missed after 20 s.

It says how often it means to be heard of; the SuperLink takes nothing below 10 s, and misses it after twice that.
"""

import time
from types import SimpleNamespace


def main() -> None:
    """Takes the arguments of flower-supernode."""
    from flwr.common import constant

    constant.HEARTBEAT_DEFAULT_INTERVAL = 10  # others import the number, so it is set before them

    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    start_client_internal.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10))
    flower_supernode()


if __name__ == "__main__":
    main()
