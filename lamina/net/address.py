"""Where a coordinator is and how it is reached: its address, the proxy on the way, and who vouches for it.

Python's own modules alone, imported where they are needed: the training process uses this for its heartbeat.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.errors import ConfigError

if TYPE_CHECKING:
    import ssl

EXAMPLE = "http://192.168.1.10:8763"


@dataclass(frozen=True, repr=False)
class Proxy:
    """A proxy of the environment: where it is, and the variable that named it. `url` may hold a password."""

    url: str
    variable: str

    def __str__(self) -> str:
        from urllib.parse import urlsplit

        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}:{parts.port or 80} ({self.variable})"


def coordinator_address(text: str) -> str:
    """The address without a slash at its end. Raises ConfigError for text that is none."""
    from urllib.parse import urlsplit

    wrong = ConfigError(f"{text[:200]!r} is no coordinator address; it looks like {EXAMPLE}")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not host or port == 0 or not text.isprintable() or " " in text:
        raise wrong
    if "@" in parts.netloc:
        raise ConfigError(f"the address of {host} is no coordinator address: it holds a user name or password; leave them out")
    if parts.query or parts.fragment:
        raise wrong
    return text.rstrip("/")


def proxy_of(url: str, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy that the environment names for an address, as curl reads it: <SCHEME>_PROXY, else ALL_PROXY; NO_PROXY exempts.

    This machine itself is never asked through a proxy. Raises ConfigError for a proxy that does not speak HTTP.
    """
    from urllib.parse import urlsplit
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    target = urlsplit(url)
    host = target.hostname or ""
    names = [name for stem in (target.scheme, "all") for name in (f"{stem}_proxy", f"{stem}_proxy".upper())]
    variable = next((name for name in names if environment.get(name)), None)
    if variable is None or is_loopback(host):
        return None
    exempt = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if proxy_bypass_environment(target.netloc, {"no": exempt}) or _is_in_network(host, exempt):
        return None
    value = environment[variable]
    proxy = Proxy(value if "://" in value else f"http://{value}", variable)
    try:
        parts = urlsplit(proxy.url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        kind = proxy.url.partition("://")[0][:20]
        raise ConfigError(
            f"the variable {variable} names a proxy that is not used here ({kind}): lamina goes through http:// and https:// "
            f"proxies alone. Unset it, or add {host} to NO_PROXY"
        )
    return proxy


def is_loopback(host: str) -> bool:
    from ipaddress import ip_address

    if host.rstrip(".").lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _is_in_network(host: str, exempt: str) -> bool:
    """Whether the host is an address in one of the networks of NO_PROXY, such as 192.168.0.0/16."""
    from ipaddress import ip_address, ip_network

    try:
        address = ip_address(host)
    except ValueError:
        return False
    for entry in exempt.split(","):
        try:
            if address in ip_network(entry.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False


def tls_context() -> "ssl.SSLContext":
    """Verifies with the authorities that this machine knows, those of the certifi package, and those of SSL_CERT_FILE.

    Raises ConfigError if SSL_CERT_FILE cannot be read.
    """
    import ssl

    context = ssl.create_default_context()
    own = os.environ.get("SSL_CERT_FILE")
    try:
        if own:
            context.load_verify_locations(cafile=own)
    except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
        raise ConfigError(f"SSL_CERT_FILE names {own}, which is no file of certificates: {error}") from error
    if not own:
        try:
            import certifi
        except ImportError:
            return context
        context.load_verify_locations(cafile=certifi.where())
    return context
