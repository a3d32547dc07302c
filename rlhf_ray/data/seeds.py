"""Seeds made from names: the same in every process, on every machine, in every order of asking."""

from hashlib import blake2b


def sample_seed(run_seed: int, uid: str, sample_index: int) -> int:
    """Seed of the sampler for one response: 63 bits, so that it fits a signed 64-bit integer.

    Args:
        run_seed: `seed` of the config.
        uid: of the prompt's visit (`cursor.visit_uid`), so that a later epoch draws new responses.
        sample_index: which of the prompt's samples it is.
    """
    return _hash63("sample", run_seed, uid, sample_index)


def derive_seed(run_seed: int, *names: str | int) -> int:
    """Seed of any other random stream, such as `derive_seed(seed, "policy", rank)`: 63 bits."""
    return _hash63("stream", run_seed, *names)


def _hash63(*parts: str | int) -> int:
    digest = blake2b(digest_size=8)
    for part in parts:
        # The type and the length keep apart what would be one string of bytes: 1 and "1", ("a", "bc") and ("ab", "c").
        data = str(part).encode()
        digest.update(f"{type(part).__name__}:{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest(), "big") >> 1
