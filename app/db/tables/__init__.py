"""One file per table; importing this package defines them all."""

from app.db.tables.api_key import ApiKey
from app.db.tables.dataset import Dataset, DeletedExample
from app.db.tables.generation import IndexGeneration
from app.db.tables.idempotency import Idempotency
from app.db.tables.index import Index, IndexPrior
from app.db.tables.job import Job, JobEvent, Shard
from app.db.tables.model import Checkpoint, Model
from app.db.tables.replay import Bank, BankGroup, Replay

__all__ = [
    "ApiKey",
    "Bank",
    "BankGroup",
    "Checkpoint",
    "Dataset",
    "DeletedExample",
    "Idempotency",
    "Index",
    "IndexGeneration",
    "IndexPrior",
    "Job",
    "JobEvent",
    "Model",
    "Replay",
    "Shard",
]
