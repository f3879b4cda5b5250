"""Whether the hub can be reached at all. Its client asks five times over 23 seconds where its name
cannot even be resolved, before it looks for what it has kept.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies


@contextmanager
def hub_at_hand() -> Iterator[None]:
    """Within it the hub's client (of models, and of datasets) is as offline as the machine is: it
    then answers from its own cache, or refuses, at once.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _resolves(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _resolves(address: str) -> bool:
    """Whether somebody knows the host of this address; a proxy may, whom we do not ask."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(address).hostname, None)
    except OSError:
        return False
    return True
