"""What the planner can't answer."""


class PlanError(Exception):
    """A plan can't be made of what was given.

    Attributes:
        subject: the model, cluster or key that is the reason.
        reason: what is wrong with it, and the cure.
    """

    def __init__(self, subject: str, reason: str) -> None:
        self.subject, self.reason = subject, reason
        super().__init__(f"{subject}: {reason}")

    def __reduce__(self) -> tuple[type["PlanError"], tuple[str, str]]:
        return type(self), (self.subject, self.reason)
