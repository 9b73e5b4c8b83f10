"""Principal: who is calling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_TENANT = "default"

# To whom the changes are attributed that the service itself makes.
SYSTEM_USER = "system"


@dataclass(frozen=True, slots=True)
class Principal:
    """
    Who is calling.

    Attributes:
        user_id: Identity of the user.
        tenant: The data set that the caller works on.
        roles: What the user is.
        claims: What else is known of the user, by name.
    """

    user_id: str
    tenant: str = DEFAULT_TENANT
    roles: frozenset[str] = frozenset()
    claims: Mapping[str, Any] = field(default_factory=dict)

    def claims_and_identity(self) -> dict[str, Any]:
        """Return what constraints can compare with: the claims, and user_id, tenant and roles."""
        return {
            **self.claims,
            "user_id": self.user_id,
            "tenant": self.tenant,
            "roles": sorted(self.roles),
        }


ANONYMOUS = Principal("anonymous")
