"""Which weights a rollout engine has: a pure account, by which it refuses to work without them."""

from rlhf_ray.config.roles import Level


class WeightsMissing(Exception):
    """A role was to work without weights, or to take weights without memory for them.

    Attributes:
        role: such as `rollout`.
        work: what it was to do.
        reason: why it can't.
        cure: what has to come first.
    """

    def __init__(self, role: str, work: str, reason: str, cure: str) -> None:
        self.role, self.work, self.reason, self.cure = role, work, reason, cure
        super().__init__(f"{role} can't {work}: {reason}. {cure}")

    def __reduce__(self) -> tuple[type["WeightsMissing"], tuple[str, str, str, str]]:
        return type(self), (self.role, self.work, self.reason, self.cure)


DROPPED = "it left its devices to other roles and dropped its weights"
SYNC_FIRST = "A weight sync has to come first: PolicyWorker.send_weights, with the engines at level WEIGHTS or above"


class HeldWeights:
    """What an engine has, as it is told.

    Args:
        keeps: weights that leave the device stay in host memory; else they are lost, and sent anew.

    Attributes:
        level: how much of the engine is on its device.
        version: of the weights; None while it has none that it could use.
    """

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps
        self.level = Level.FULL
        self.version: int | None = None
        self._arriving = False
        self._reason = "it has not loaded any weights yet"

    def has(self, version: int) -> None:
        """It has whole weights of this version."""
        self.version, self._arriving = version, False

    def lost(self, reason: str) -> None:
        """It has none any more."""
        self.version, self._arriving, self._reason = None, False, reason

    def moved(self, level: Level) -> bool:
        """It has gone, or is about to go, or has come to `level`.

        Returns:
            Whether this made it lose weights that are nowhere else. Whatever goes, the KV cache alone too, goes by
            vLLM's sleep, which takes the weights along.
        """
        loses = level < self.level and not self._keeps
        self.level = level
        if loses:
            self.lost(DROPPED)
        return loses

    def arriving(self) -> None:
        """New weights are about to take the place of what it has.

        Raises:
            WeightsMissing: there is no memory for them on the device.
        """
        if self.level == Level.OUT:
            raise WeightsMissing(
                "rollout",
                "take new weights",
                "it has left its devices to other roles, its memory for weights too",
                "It has to come to level WEIGHTS first: Devices.enter('sync')",
            )
        self.lost("the weight sync that began last has not ended")
        self._arriving = True

    def check_queueing(self) -> None:
        """Whether prompts may be queued; they may while weights arrive, since nothing is generated then.

        Raises:
            WeightsMissing: they would never be answered, or by garbage.
        """
        if not self._arriving:
            self.check_generating()

    def check_generating(self) -> None:
        """Whether queued prompts may be answered.

        Raises:
            WeightsMissing: they would be by garbage.
        """
        if self.version is None:
            raise WeightsMissing("rollout", "generate", self._reason, SYNC_FIRST)
