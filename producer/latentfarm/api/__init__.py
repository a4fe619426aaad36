"""The farm over HTTP: its own API, and those that clients already speak, on the same core as the SDK."""

from latentfarm.api.app import create_app

__all__ = ["create_app"]
