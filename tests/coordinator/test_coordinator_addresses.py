"""What a device is told: addresses that it can use."""

from ipaddress import ip_address

from coordinator.http.addresses import device_urls, own_addresses


def test_the_machines_own_addresses_are_named_loopback_last():
    addresses = own_addresses()
    assert addresses[-1] == "127.0.0.1"
    assert not any(ip_address(address).is_unspecified for address in addresses)


def test_a_coordinator_on_all_addresses_names_those_of_the_machine_with_its_port():
    urls = device_urls("http://0.0.0.0:8763", "0.0.0.0")
    assert urls == [f"http://{address}:8763" for address in own_addresses()]


def test_a_coordinator_on_one_address_names_that():
    assert device_urls("http://127.0.0.1:8763", "127.0.0.1") == ["http://127.0.0.1:8763"]
    assert device_urls("http://box.local:8763", "box.local") == ["http://box.local:8763"]
