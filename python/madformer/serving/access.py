"""Who may ask: API keys, and what a request of a browser must look like."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from madformer.files.text import read_text
from madformer.serving.errors import ServingError

if TYPE_CHECKING:
    from madformer.serving.service import Service

ENVIRONMENT = "MADFORMER_API_KEYS"
SHORTEST = 16


@dataclass(frozen=True)
class Keys:
    """API keys, of which only digests are kept.

    Attributes:
        digests: SHA-256 of each.
    """

    digests: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def of(cls, keys: Iterable[str]) -> Self:
        """Raises ``ValueError`` for none, or one that is too short; without telling it."""
        found = [key.strip() for key in keys if key.strip()]
        if not found:
            raise ValueError("there is no API key")
        if min(map(len, found)) < SHORTEST:
            raise ValueError(f"an API key must have at least {SHORTEST} characters")
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in found))

    @classmethod
    def load(cls, file: Path | None) -> Self | None:
        """From a file with one a line, or from the environment (``MADFORMER_API_KEYS``, commas between them).

        Returns:
            None where neither names any.

        Raises:
            OSError, ValueError: the file cannot be read, or holds none.
        """
        if file is not None:
            lines = read_text(file).splitlines()
            return cls.of(line for line in lines if not line.lstrip().startswith("#"))
        given = os.environ.get(ENVIRONMENT, "")
        return cls.of(given.split(",")) if given.strip() else None

    def client(self, key: str) -> str | None:
        """A name for whoever has this key, which does not tell it; None where it is none. Takes as long for any."""
        digest, found = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), None
        for known in self.digests:
            if hmac.compare_digest(digest, known):
                found = f"key-{known.hex()[:8]}"
        return found


_bearer = HTTPBearer(auto_error=False, description="an API key, where the server has any")


def client_of(request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    """By its key, or by its address where there are none.

    Raises:
        ServingError: 401, a key is missing or unknown.
    """
    keys: Keys | None = request.app.state.keys
    if keys is None:
        return request.client.host if request.client is not None else "local"
    name = None if bearer is None else keys.client(bearer.credentials)
    if name is None:
        what = "an API key is missing: send Authorization: Bearer KEY" if bearer is None else "the API key is unknown"
        error = ServingError(401, what, "invalid_api_key", kind="authentication_error")
        raise error
    return name


Client = Annotated[str, Depends(client_of)]


def service_of(request: Request) -> Service:
    return request.app.state.service


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, for itself alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: Keys | None) -> None:
    """Raises ``ValueError`` for an address that others reach, without a key that they need."""
    if not is_loopback(host) and keys is None:
        raise ValueError(
            f"--host {host} can be reached by others: give --api-key-file FILE, or keys in {ENVIRONMENT}, "
            "or stay with 127.0.0.1"
        )
