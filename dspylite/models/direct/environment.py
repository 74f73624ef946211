"""What the usual environment variables say about proxies and certificates.

They are read when a host is first asked. Not here: keys and endpoints (`providers.py`).
"""

from __future__ import annotations

import functools
import os
import ssl
import urllib.request
from typing import Any

_CA_FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def proxy_for(scheme: str, host: str) -> str | None:
    """Return the proxy's URL for a host; None where it is reached directly.

    Reads `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, in either case.

    Args:
        scheme: `"http"` or `"https"`.
        host: With its port where it is not the scheme's own.
    """
    library: Any = urllib.request  # typeshed lacks one of the two
    proxies: dict[str, str] = library.getproxies_environment()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or library.proxy_bypass_environment(host, proxies):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def tls_context() -> ssl.SSLContext:
    """Return a context that trusts what `SSL_CERT_FILE` or its other spellings name.

    Without any, it trusts the system's certificates, and those of the package `certifi` where the
    system has none, as in many containers. Server certificates are always checked.
    """
    file = next(filter(None, map(os.environ.get, _CA_FILES)), None)
    return _tls_context(file, os.environ.get("SSL_CERT_DIR") or None)


@functools.lru_cache(maxsize=4)  # reading the certificates takes 20 ms, which each new loop would
def _tls_context(file: str | None, folder: str | None) -> ssl.SSLContext:
    if file is not None:
        return ssl.create_default_context(cafile=file)
    context = ssl.create_default_context(capath=folder)
    if not context.cert_store_stats()["x509_ca"] and folder is None:
        import certifi  # noqa: PLC0415  # comes with litellm; needed on bare systems only

        context.load_verify_locations(certifi.where())
    return context
