"""Where the demo checkpoint and its embeddings lie. Data only."""

from pathlib import Path

CHECKPOINT = Path(__file__).with_name("checkpoint")
EMBEDDINGS = Path(__file__).with_name("embeddings")
