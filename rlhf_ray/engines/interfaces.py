"""The network that collectives use. Imports little: the preflight needs it in a process of its own."""

import os

import psutil


def use_interface_of(address: str) -> None:
    """Have collectives of this process talk over the network interface with this address, unless the environment names
    one. gloo would take the one that the host's name resolves to, which on many machines is loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign, all names that begin so
