"""What a server allows, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

from madformer.arguments import number, truth_value, whole_number


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows, and how long it waits; a field's comment is its line of help on the command line.

    Raises:
        ValueError: a number that makes no sense.
    """

    slots: int = 8  # images that are drawn at once, each at a step of its own
    compile: bool = False  # on a processor, compile the denoising steps first: minutes once, then kept and faster
    max_waiting: int = 64  # images that may wait; requests beyond are answered 429, with the time to try again
    max_per_client: int = 32  # images of one client, by key or address, that may wait and be drawn
    max_images: int = 8  # images of one request
    max_steps: int = 100  # denoising steps of a block that a request may ask for
    max_prompt: int = 2000  # characters of a prompt
    max_body: int = 16 * 2**20  # bytes of a request
    max_pixels: int = 2**24  # pixels of an uploaded picture
    grace: float = 30.0  # seconds that what is being drawn has when the server is told to end
    reconnect: float = 5.0  # seconds until a request whose client went away is cancelled
    keep: float = 120.0  # seconds that a result can be asked for by its id
    keep_bytes: int = 256 * 2**20  # bytes of pictures that are kept for that
    stall: float = 60.0  # seconds that a client may take nothing of what it is sent
    url_lifetime: float = 3600.0  # seconds that the address of a picture is good for
    cors_origins: tuple[str, ...] = ()  # origins of other pages that may use the server from a browser

    def __post_init__(self) -> None:
        truth_value("compile", self.compile)
        for name in ("slots", "max_waiting", "max_per_client", "max_images", "max_steps", "max_prompt", "max_body",
                     "max_pixels", "keep_bytes"):  # fmt: skip
            whole_number(name, getattr(self, name), 1)
        for name in ("grace", "reconnect", "keep", "stall", "url_lifetime"):
            number(name, getattr(self, name), 0)
        for name, room in (
            ("slots + max_waiting", self.slots + self.max_waiting),
            ("max_per_client", self.max_per_client),
        ):
            if self.max_images > room:
                raise ValueError(
                    f"max_images={self.max_images} must be at most {name}={room}: they could never be drawn"
                )
