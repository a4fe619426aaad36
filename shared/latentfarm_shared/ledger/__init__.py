"""The ledger: Redis holds every job, claim and lease; each transition is one atomic script."""

from latentfarm_shared.ledger.ledger import Claim, Ledger, WorkerStatus
from latentfarm_shared.ledger.states import ImageState, JobState, JobStatus

__all__ = ["Claim", "ImageState", "JobState", "JobStatus", "Ledger", "WorkerStatus"]
