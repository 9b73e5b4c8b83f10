"""Plans: what the server does with each entity, as it says at the start of a session."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from tidelog._downloads import DownloadMode
from tidelog._errors import damaged
from tidelog.v1 import sync_pb2


class Plans:
    """
    What the server does with the entities. Those that it does not name are downloaded whole.

    Args:
        message: The start of the session. Without one: it names none, and reconciles nothing.

    Attributes:
        modes: How much is downloaded of the entities that are named.
        upload_excluded: The entities whose operations stay behind unless they are selected.
        reconcile: Whether everything that is downloaded is reconciled.
        common_version: Up to where the server's timeline and an older one that the replica
            knows are the same; 0 if it knows none.
    """

    def __init__(self, message: sync_pb2.SessionStarted | None = None) -> None:
        self._entities = {} if message is None else {plan.entity: plan for plan in message.entities}
        self.modes = {entity: DownloadMode.of_number(plan.mode) for entity, plan in self._entities.items()}
        self.upload_excluded = frozenset(entity for entity, plan in self._entities.items() if plan.upload_excluded)
        self.reconcile = message is not None and message.reconcile
        self.common_version = message.common_version if message is not None else 0
        self._cause = message.reconcile_cause if message is not None else _NO_CAUSE

    @property
    def reconcile_any(self) -> bool:
        """Whether there may be an entity that is reconciled."""
        return self.reconcile or any(map(self.reconciles, self._entities))

    @property
    def is_unexplained(self) -> bool:
        """Whether everything is reconciled and the server does not say why."""
        return self.reconcile and self._cause == _NO_CAUSE

    def downloads(self, entity: str) -> bool:
        """Tell whether objects of an entity are downloaded."""
        return self.modes.get(entity, DownloadMode.ALL).downloads

    def reconciles(self, entity: str) -> bool:
        """Tell whether what the download does not bring of an entity is to be removed."""
        plan = self._entities.get(entity)
        return self.downloads(entity) and (self.reconcile or (plan is not None and plan.reconcile))

    def states_cause(self, entity: str) -> bool:
        """Tell whether the server says why an entity is reconciled."""
        plan = self._entities.get(entity)
        return (self._cause if self.reconcile or plan is None else plan.reconcile_cause) != _NO_CAUSE

    def in_mode(self, mode: DownloadMode) -> list[str]:
        """Return the entities that are named in a mode."""
        return [entity for entity, one in self.modes.items() if one is mode]

    def lasting(self) -> Plans:
        """Return what of them holds beyond the session."""
        return Plans(
            sync_pb2.SessionStarted(
                entities=[
                    sync_pb2.EntityPlan(entity=plan.entity, mode=plan.mode, upload_excluded=plan.upload_excluded)
                    for plan in self._entities.values()
                ]
            )
        )

    def encode(self) -> bytes:
        """Return the bytes to remember them by."""
        message = sync_pb2.SessionStarted(
            reconcile=self.reconcile,
            reconcile_cause=self._cause,
            common_version=self.common_version,
            entities=self._entities.values(),
        )
        return message.SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, data: bytes) -> Plans:
        """Return what `encode` made bytes of; of none, those that name no entity."""
        try:
            return cls(sync_pb2.SessionStarted.FromString(data))
        except DecodeError as error:
            raise damaged("what the server said of its plans") from error


_NO_CAUSE = sync_pb2.RECONCILE_CAUSE_UNSPECIFIED
