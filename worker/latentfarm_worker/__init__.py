"""The worker: Celery process, engine, conditioning, samplers, checkpoints. The only side that knows torch."""
