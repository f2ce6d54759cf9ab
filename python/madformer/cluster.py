"""A Ray cluster as what deals work to it needs it: joined or started, how many may work, and what went wrong."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from madformer.kernels.dispatch import BackendUnavailableError

__all__ = ["Share", "first_cause", "joined", "share_of"]


@dataclass(frozen=True)
class Share:
    """What of a cluster's resources goes to each of several workers.

    Attributes:
        workers: how many. num_cpus: of each; None for Ray's default. num_gpus: of each; None for none.
    """

    workers: int
    num_cpus: int | None
    num_gpus: int | None


@contextlib.contextmanager
def joined(extra: str = "ray") -> Iterator[None]:
    """Within it Ray is there: the cluster that ``RAY_ADDRESS`` names, else one on this machine that ends with it.

    Args:
        extra: of this package, which brings what of Ray is needed.

    Raises:
        ImportError: Ray is not installed. What a worker raised, in place of Ray's errors that hold it.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"Ray is not installed: pip install 'madformer[{extra}]'") from error
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    except ray.exceptions.RayError as error:
        raise first_cause(error) from None
    finally:
        if started_here:
            ray.shutdown()


def share_of(workers: int | None, *, on_gpu: bool) -> Share:
    """Share out the cluster that was :func:`joined`.

    Args:
        workers: how many; None for one a GPU of the cluster, or one without.
        on_gpu: give each a GPU.

    Raises:
        ValueError: the cluster has no GPU.
    """
    import ray

    resources = ray.cluster_resources()
    workers = workers or (int(resources.get("GPU", 0)) if on_gpu else 1)
    if workers == 0:
        raise ValueError("the Ray cluster has no GPU: give --device cpu")
    # without it an actor's torch has one thread
    num_cpus = None if on_gpu else max(1, int(resources["CPU"]) // workers)
    return Share(workers, num_cpus, 1 if on_gpu else None)


def first_cause(error: BaseException) -> BaseException:
    """What a worker raised, under Ray's own errors, if it is one that is told in a line; else Ray's error."""
    import ray

    inner: BaseException | None = error
    while inner is not None:
        # Ray's own may be of both classes, and tells a traceback
        if not isinstance(inner, ray.exceptions.RayError) and isinstance(
            inner, (ValueError, OSError, FloatingPointError, BackendUnavailableError)
        ):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
