"""
Whether a server can be reached, asked before a library that would retry for minutes is called.
"""

import os
import urllib.error
import urllib.request

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def reachable(url: str) -> bool:
    """Whether the server of `url` answers within ten seconds."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return True  # it answers, if only to complain
    except OSError:
        return False
    return True
