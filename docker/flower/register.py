"""Tells the SuperLink which nodes may take part: those whose public keys lie in /keys. It may be said again."""

from pathlib import Path

from connection import CA, connect, flwr

KNOWN = "already"  # what Flower answers where it knows a key

if __name__ == "__main__":
    connect(insecure=False)
    for key in sorted(Path(CA.parent).glob("*.pub")):
        try:
            flwr("supernode", "register", key, "--name", key.stem)
        except RuntimeError as error:
            if KNOWN not in str(error):
                raise SystemExit(f"Error: {key.name}: {error}") from None
        print(f"{key.stem} may take part")
