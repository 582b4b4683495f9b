"""Warnings that would otherwise repeat for each file of a data set."""

from __future__ import annotations

import logging

_said: set[str] = set()


def warn_once(logger: logging.Logger, topic: str, message: str) -> None:
    """Log the first message of a topic in this process."""
    if topic not in _said:
        _said.add(topic)
        logger.warning("%s (said once; other files may be alike)", message)
