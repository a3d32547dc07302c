"""Collectives take the interface of a node's address, and no other."""

import os

import psutil
import pytest

from rlhf_ray.engines.interfaces import use_interface_of

# As bonds and virtual functions are named beside the interface that they belong to.
INTERFACES = {"lo": "127.0.0.1", "eth1": "10.0.0.1", "eth10": "10.1.0.1", "eth1.200": "10.2.0.1"}


def matches(variable: str, interface: str) -> bool:
    """As NCCL reads `NCCL_SOCKET_IFNAME`: a list of beginnings of names, or of whole names after `=`."""
    whole = variable.startswith("=")
    wanted = variable.removeprefix("=").split(",")
    return any(interface == name if whole else interface.startswith(name) for name in wanted)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    own: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", own)
    address = type("Address", (), {"__init__": lambda self, text: setattr(self, "address", text)})
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {name: [address(text)] for name, text in INTERFACES.items()})
    return own


@pytest.mark.parametrize("name", INTERFACES)
def test_one_interface_is_named_to_each_library(environment: dict[str, str], name: str) -> None:
    use_interface_of(INTERFACES[name])
    assert environment["GLOO_SOCKET_IFNAME"] == name, "gloo takes whole names only"
    assert [other for other in INTERFACES if matches(environment["NCCL_SOCKET_IFNAME"], other)] == [name]


def test_what_the_environment_names_stays(environment: dict[str, str]) -> None:
    environment["NCCL_SOCKET_IFNAME"] = "ib"
    use_interface_of("10.0.0.1")
    assert (environment["NCCL_SOCKET_IFNAME"], environment["GLOO_SOCKET_IFNAME"]) == ("ib", "eth1")
