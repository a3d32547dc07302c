"""Silence for what libraries say that is no news to the user. With `-v` it is heard."""

import logging
import os

# Logger and how the message begins. Filters, not levels: the libraries set their levels while they are imported.
_NO_NEWS = (
    ("DeepSpeed", "Setting accelerator to CPU"),
    ("ray._private.authentication.authentication_token_setup", "Token authentication is enabled"),
    ("ray.dashboard.modules.dashboard_sdk", "Uploading package"),
    ("ray.dashboard.modules.dashboard_sdk", "Package "),
    ("ray.dashboard.modules.job.sdk", "WebSocket closed"),
)


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)


_FILTERS = tuple((logging.getLogger(name), _Without(beginning)) for name, beginning in _NO_NEWS)


def quiet_libraries(verbose: bool) -> None:
    """To be called before transformers is imported; a second call replaces."""
    for library_logger, no_news in _FILTERS:
        (library_logger.removeFilter if verbose else library_logger.addFilter)(no_news)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars heed it too
