"""Farms reached over HTTP: the calls written once, sent from ordinary code or from an event loop."""
