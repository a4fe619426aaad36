"""Webhooks: what happened, told to somebody's address, signed, at least once, over restarts."""

from latentfarm.api.webhooks.outbox import Outbox
from latentfarm.api.webhooks.sender import Sender
from latentfarm.api.webhooks.watcher import HookWatcher

__all__ = ["HookWatcher", "Outbox", "Sender"]
