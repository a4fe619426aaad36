"""What producer and worker agree on: specs, ledger, storage, prompt language, embedding files. No torch."""

__version__ = "0.1.0"
