"""What the usual environment variables say about proxies and certificates.

They are read when a host is first asked. Not here: keys and endpoints (`providers.py`).
"""

from __future__ import annotations

import base64
import functools
import os
import ssl
import urllib.parse
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


def split_proxy(proxy: str) -> tuple[str, str | None]:
    """Part a proxy's URL, which errors may show, from the user and password in it.

    Returns:
        The URL without them, and what they are as a `proxy-authorization` header; None for none.

    Example:
        >>> split_proxy("http://user:pa%20ss@proxy:3128")
        ('http://proxy:3128', 'Basic dXNlcjpwYSBzcw==')
    """
    scheme, _, rest = proxy.partition("://")
    # The last "@", so that nothing of a password that should have been quoted stays in the URL.
    user_info, _, place = rest.rpartition("@")
    if not user_info:
        return f"{scheme}://{place}", None
    user, _, password = user_info.partition(":")
    plain = f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password)}"
    return f"{scheme}://{place}", f"Basic {base64.b64encode(plain.encode()).decode()}"


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
