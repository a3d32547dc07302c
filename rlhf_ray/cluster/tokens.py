"""Ray's authentication: when a client shows the token that it has.

A Ray 2.60 cluster asks for a token by default. Ray's own clients look for one (in `RAY_AUTH_TOKEN`, in the file that
`RAY_AUTH_TOKEN_PATH` names, in `~/.ray/auth_token`) only when `RAY_AUTH_MODE` is `token`.
"""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

import ray

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

HOW_TO_GIVE_A_TOKEN = (
    f"set {MODE}=token, and the cluster's token in {TOKEN}, in a file that {TOKEN_PATH} names, or in ~/.ray/auth_token "
    "(`ray get-auth-token` on the head node shows it)"
)

_OWN_MACHINE = {"localhost", "127.0.0.1", "::1"}


def show_token(address: str) -> None:
    """Switch token mode on for this process, where the user wants that (`wants_token`)."""
    has_token = ray._raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    if MODE not in os.environ and wants_token(address, os.environ, has_token):
        os.environ[MODE] = "token"
        ray._raylet.Config.initialize("")  # Ray has read its settings already


def wants_token(address: str, environment: Mapping[str, str], has_token: bool) -> bool:
    """Whether a token is to be shown to the cluster at `address`.

    It is when the environment has one, or when the cluster is on this machine, which has a token file. The file's token
    goes to no other address unless `RAY_AUTH_MODE` says so, lest a mistyped one gets it.
    """
    if MODE in environment:
        return environment[MODE].lower() == "token"
    given = bool(environment.get(TOKEN) or environment.get(TOKEN_PATH))
    return given or (has_token and _is_own_machine(address))


def _is_own_machine(address: str) -> bool:
    return address == "auto" or urlsplit(address if "://" in address else f"//{address}").hostname in _OWN_MACHINE
