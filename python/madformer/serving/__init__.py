"""A model as a service: requests share its steps, and pictures appear block by block.

``madformer serve`` starts it; :func:`create_app` is the application that it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from madformer.lazy import exporter

if TYPE_CHECKING:
    from madformer.serving.access import Keys
    from madformer.serving.app import create_app
    from madformer.serving.settings import ServerSettings

__all__ = ["Keys", "ServerSettings", "create_app"]

__getattr__ = exporter(
    __name__,
    {
        "madformer.serving.access": ("Keys",),
        "madformer.serving.app": ("create_app",),
        "madformer.serving.settings": ("ServerSettings",),
    },
)
