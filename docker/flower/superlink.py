"""Flower's SuperLink, of which other containers and machines reach only what nodes need.

It takes the arguments of flower-superlink. That serves three APIs at one port. The Fleet API knows a node by its key.
The Control API, which registers nodes and starts runs, and the Runtime API, which hands out the work, ask nobody who he
is: whoever reached them would run what he likes on all nodes. So they answer only to programs of this container, and of
one that shares its network, as the runner does.
"""

from typing import Any

from flwr.superlink import extensions
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

HERE = ("127.0.0.1", "::1")
FOR_NODES = ("/v1/fleet/", "/health")


class Gate:
    """Refuses what comes from elsewhere and is not for nodes."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or answers 403."""
        here = scope["type"] == "lifespan" or (scope.get("client") or ("",))[0] in HERE
        if here or (scope["type"] == "http" and scope["path"].startswith(FOR_NODES)):
            await self.app(scope, receive, send)
        else:
            refusal = PlainTextResponse("Only nodes are served here: runs are started at the SuperLink itself.\n", 403)
            await refusal(scope, receive, send)


def gate() -> tuple[Middleware, ...]:
    """What Flower puts around its APIs."""
    return (Middleware(Gate),)


if __name__ == "__main__":
    if not callable(getattr(extensions, "get_middleware", None)):  # the hook of another version may have another name
        raise SystemExit("This version of Flower has no place for the gate; without it, the SuperLink is not started.")
    extensions.get_middleware = gate
    flower_superlink()
