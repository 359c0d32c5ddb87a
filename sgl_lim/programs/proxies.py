"""Proxies of the environment: loopback is never asked through one, and an error through one names it."""

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit

import requests.utils

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine by name or address; 0.0.0.0 and [::] reach it as well."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def direct_loopback(environment: Mapping[str, str], url: str | None = None) -> dict[str, str]:
    """The variable to set in an environment so that no client asks loopback through a proxy; {} if none has to be set.

    Hosts that the user excepted stay so, and proxies of all other hosts stay in force.

    Args:
        environment: with the proxies.
        url: a loopback URL whose host is excepted too.
    """
    if not any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in environment):
        return {}
    # Where both are set, clients read the lower case.
    excepted = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = [name.strip() for name in excepted.split(",") if name.strip()]
    wanted = list(_LOOPBACK)
    if url is not None:
        # urllib compares an IPv6 address with its brackets. httpx cannot read these, so no other URL gets them.
        host = urlsplit(url).hostname or ""
        wanted.append(f"[{host}]" if ":" in host else host)
    missing = [name for name in wanted if name and name not in names]
    return {"no_proxy": ",".join([*names, *missing])} if missing and "*" not in names else {}


def keep_direct(url: str) -> None:
    """If a URL is loopback, let this process and its children ask loopback directly, by whatever client.

    SGLang's frontend asks by urllib, others by requests or httpx: what all of them follow is the environment.
    """
    if is_loopback(url):
        os.environ.update(direct_loopback(os.environ, url))


def proxy_of(url: str) -> str | None:
    """The proxy that a URL is asked through, as the environment has it; None for none."""
    if is_loopback(url):
        return None
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    return str(proxy) if proxy else None


def through(url: str) -> str:
    """` (through the proxy …)` to be read after a URL, without the proxy's password; blank without a proxy."""
    proxy = proxy_of(url)
    if proxy is None:
        return ""
    scheme, separator, rest = proxy.rpartition("://")
    return f" (through the proxy {scheme}{separator}{rest.rpartition('@')[2]} of the environment)"
