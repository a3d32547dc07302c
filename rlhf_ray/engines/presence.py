"""Models that are to work while they have left their device."""

from rlhf_ray.config.roles import Level


class NotOnDeviceError(RuntimeError):
    """A model was to work while what it needs is not on its device.

    Attributes:
        what: it was to do.
        there: what it has on its device.
        needed: what it would need there.
    """

    def __init__(self, what: str, there: Level, needed: Level) -> None:
        self.what, self.there, self.needed = what, there, needed
        super().__init__(
            f"{what} needs {needed.name.lower()} on the device, but the model has left it as far as "
            f"{there.name.lower()}: a phase began without its moves (cluster/sharing.py)"
        )

    def __reduce__(self) -> tuple[type["NotOnDeviceError"], tuple[str, Level, Level]]:
        return type(self), (self.what, self.there, self.needed)


def check_there(what: str, there: Level, needed: Level) -> None:
    """Raise `NotOnDeviceError` where `there` is less than `needed`."""
    if there < needed:
        raise NotOnDeviceError(what, there, needed)
