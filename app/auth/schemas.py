"""Keys and what they may do."""

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, Field

Scope = Literal["read", "query", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Principal:
    """Who is asking."""

    id: str
    name: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Return whether the caller has a scope; `admin` has all."""
        return scope in self.scopes or "admin" in self.scopes


class Me(BaseModel):
    """The caller."""

    id: str = Field(description="Id of the key; `local` without keys.")
    name: str
    scopes: list[str]
