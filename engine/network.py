"""Whether a server can be reached, asked before a library retries for minutes."""

import os
import urllib.error
import urllib.request

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def reachable(url: str) -> bool:
    """Whether the server of `url` answers within ten seconds."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # an answer, if only a complaint
    return True
