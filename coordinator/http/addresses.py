"""At which addresses devices reach this machine."""

import fcntl
import socket
import struct
from ipaddress import IPv4Address, ip_address

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


def device_urls(url: str, host: str) -> list[str]:
    """What a device can be told, for a coordinator that listens at `url` on `host`: that, or this machine's own addresses where
    it listens on all of them; those that only this machine reaches come last."""
    if not _is_unspecified(host):
        return [url]
    port = url.rpartition(":")[2]
    return [f"http://{address}:{port}" for address in own_addresses()] or [f"http://{socket.gethostname()}:{port}"]


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine's interfaces, loopback last."""
    addresses: set[IPv4Address] = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            addresses.add(IPv4Address(answer[20:24]))
    return [str(address) for address in sorted(addresses, key=lambda address: (address.is_loopback, address))]


def _is_unspecified(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:  # a name
        return False
