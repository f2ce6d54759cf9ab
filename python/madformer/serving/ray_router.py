"""Which engine of a cluster has a request: imported by Ray Serve, wherever requests are dealt."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import RequestRouter


class Router(RequestRouter):
    """Of two engines, which are drawn by lot, the one with less to do; or the one that a request is ``to``.

    Not in the order of their coming (Ray's ``FIFOMixin``), by which an engine that was found for one request is given
    to another.
    """

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Of Ray: replicas among which it takes the one with less to do."""
        to = None if pending_request is None else pending_request.kwargs.get("to")
        if owner := [one for one in candidate_replicas if one.replica_id.unique_id == to]:
            return [owner]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
