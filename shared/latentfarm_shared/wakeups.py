"""Celery carries the wake-ups: a message says there is work in a queue, never which."""

from __future__ import annotations

from celery import Celery
from kombu.exceptions import OperationalError

from latentfarm_shared.errors import Unavailable
from latentfarm_shared.settings import Settings

TASK = "latentfarm.wake"


def make_celery(settings: Settings) -> Celery:
    """Build the Celery app both sides use, with the settings measured in docs/decisions."""
    app = Celery("latentfarm", broker=settings.broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        result_backend=None,
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=4,
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 1},
        task_default_queue="lf.none",
        control_queue_expires=60,
        control_queue_ttl=60,
        broker_transport_options={
            "visibility_timeout": 600,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "health_check_interval": 10,
            "socket_timeout": 15,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "priority_steps": [0],
        },
    )
    return app


def celery_queue(queue: str) -> str:
    """Return Celery's name for a queue of the ledger."""
    return f"lf.{queue.replace(':', '.')}"


def ring(app: Celery, queue: str, tickets: list[str]) -> None:
    """Send one wake-up a ticket."""
    try:
        with app.producer_pool.acquire(block=True, timeout=5) as producer:
            for ticket in tickets:
                app.send_task(TASK, args=(queue, ticket), queue=celery_queue(queue), producer=producer)
    except OperationalError as error:
        raise Unavailable("Redis", "the wake-up could not be sent", "the job is safe; a worker will find it") from error
