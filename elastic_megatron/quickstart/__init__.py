"""The whole story on one machine, phase by phase; each phase is a command that a user could run alone."""

from .story import quickstart

__all__ = ["quickstart"]
