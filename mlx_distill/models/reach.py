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
    constants.HF_HUB_OFFLINE = before or not hub_resolves()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_resolves() -> bool:
    """Whether somebody knows the hub's host; a proxy may, whom we do not ask."""
    from huggingface_hub import constants

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True
