"""Principal: who is calling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tidelog._errors import InvalidValue
from tidelog._values import check_id

DEFAULT_TENANT = "default"

# To whom the changes are attributed that the service itself makes.
SYSTEM_USER = "system"


@dataclass(frozen=True, slots=True)
class Principal:
    """
    Who is calling.

    Attributes:
        user_id: Identity of the user: 1 to 128 bytes, no NUL.
        tenant: The data set that the caller works on: 1 to 128 bytes, no NUL.
        roles: What the user is.
        claims: What else is known of the user, by name.

    Raises:
        InvalidValue: A part that cannot be.
    """

    user_id: str
    tenant: str = DEFAULT_TENANT
    roles: frozenset[str] = frozenset()
    claims: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_id(self.user_id, "a user id")
        # The empty name is the server's own.
        check_id(self.tenant, "a tenant")
        if not isinstance(self.roles, frozenset):
            raise InvalidValue(f"the roles of a principal are a frozenset, got a {type(self.roles).__name__}")
        for role in self.roles:
            check_id(role, "a role")

    def claims_and_identity(self) -> dict[str, Any]:
        """Return what constraints can compare with: the claims, and user_id, tenant and roles."""
        return {
            **self.claims,
            "user_id": self.user_id,
            "tenant": self.tenant,
            "roles": sorted(self.roles),
        }


ANONYMOUS = Principal("anonymous")
