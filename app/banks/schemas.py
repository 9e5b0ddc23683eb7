"""Banks as clients see them."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field


class BankOut(BaseModel):
    """A bank of retrainings."""

    id: str
    model: str
    dataset: str
    protocol: dict[str, Any]
    retrainings: int
    diverged: int = Field(description="Retrainings whose weights stopped being finite; they are left out everywhere.")
    bytes: int
    created_at: datetime
