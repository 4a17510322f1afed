"""How the programs here ask the SuperLink: by Flower's own command `flwr`."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ADDRESS = "127.0.0.1:8000"  # they share the network of its container
CA = Path("/keys/ca.pem")


def connect(insecure: bool) -> None:
    """Writes down for `flwr` where the SuperLink is, and by which authority it is known."""
    trust = "insecure = true" if insecure else f'root-certificates = "{CA}"'
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{ADDRESS}"\n{trust}\n', encoding="utf-8"
    )


def flwr(*words: str | Path, check: Sequence[int] = (0,)) -> str:
    """What the command says.

    Raises:
        RuntimeError: it did not end well; holds what it said.
    """
    done = subprocess.run(
        ["flwr", *map(str, words)], capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    if done.returncode not in check:
        raise RuntimeError(f"flwr {words[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
