"""Ray: clients on worker processes, on this machine or on a cluster."""

from fedsim.engines.ray.engine import Ray

__all__ = ["Ray"]
