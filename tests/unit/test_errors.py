"""Every error can be reached, and the tables that carry errors over the wire have no gap."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

import tidelog
import tidelog_client
import tidelog_server
from tidelog import SynchronizationError, TidelogError
from tidelog import _errors as shared
from tidelog_client import _call_errors as calls
from tidelog_client._call_errors import Transient, error_of
from tidelog_server import TransientError
from tidelog_server import _errors as served
from tidelog_server._status import STATUS, status_of

# What the server says of calls that the replica never makes.
NOT_IN_A_SESSION = {
    "NOT_FOUND",
    "FAILURE_SETTLED",
    "FAILURE_STALE",
    "OPERATOR_REQUIRED",
    "FILE_OFFSET_MISMATCH",
    "UPLOAD_SUPERSEDED",
    "FILE_CORRUPT",
    "FILE_TOO_LARGE",
    "FILE_LOST",
}

# Raised in the server's own process only.
NOT_OVER_THE_NETWORK = {
    "AddressUnavailable",
    "ExtraMissing",
    "SchemaContradicted",
    "OperationRefused",
    "ChangedMeanwhile",
}

# Raised where the replica itself finds out, without a word of the server's.
FOUND_BY_THE_REPLICA = {
    "MassRemoval",
    "SynchronizationInProgress",
    "ServerUnavailable",
    "NotConfigured",
    "ForeignServer",
    "TokenUnavailable",
}


def classes(module: ModuleType) -> dict[str, type[BaseException]]:
    """Return the public errors that a module defines, by name."""
    return {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and issubclass(kind, BaseException)
        and kind.__module__ == module.__name__
        and not name.startswith("_")
    }


def tree(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield (name, name of its parent) as the table in the module's docstring has them."""
    parents: list[tuple[int, str]] = []
    for found in re.finditer(r"^( *)[*+-] (\w+)", module.__doc__ or "", re.MULTILINE):
        indent, name = len(found[1]), found[2]
        while parents and parents[-1][0] >= indent:
            parents.pop()
        yield name, parents[-1][1] if parents else ""
        parents.append((indent, name))


def raised_in(package: ModuleType) -> set[str]:
    """Return the names of what the modules of a package raise, or hand to `raise` in a table."""
    names: set[str] = set()
    folder = next(iter(package.__path__))
    for path in Path(folder).glob("*.py"):
        names |= {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    return names


class Call(grpc.RpcError):
    """A failed call, as gRPC hands it to a client."""

    def __init__(self, code: grpc.StatusCode, details: str, reason: str) -> None:
        super().__init__()
        detail = AnyMessage()
        detail.Pack(ErrorInfo(domain="tidelog", reason=reason))
        status = rpc_status.to_status(Status(code=Code.Value(code.name), message=details, details=[detail]))
        self._code, self._details, self._metadata = status.code, status.details, status.trailing_metadata

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return self._code

    def details(self) -> str:
        """Return the text."""
        return self._details

    def trailing_metadata(self) -> Any:
        """Return what came behind the text."""
        return self._metadata


class TestTheTree:
    @pytest.mark.parametrize("module", [shared, served])
    def test_has_every_error_in_its_place(self, module: ModuleType) -> None:
        """The table in the docstring has each error once, below the one that it is a kind of."""
        listed = dict(tree(module))
        defined = classes(module)

        assert len(listed) == len(list(tree(module))), "an error is listed twice"
        above = {"TidelogError", "StorageError"} if module is served else {"TidelogError"}
        assert listed.keys() - above == defined.keys() - above
        for name, kind in defined.items():
            bases = [base.__name__ for base in kind.__mro__[1:]]
            if listed[name]:
                public = next(base for base in bases if not base.startswith("_"))
                assert public == listed[name], f"{name} is listed below {listed[name]}, and is a {public}"

    def test_is_rooted_in_one_error(self) -> None:
        """Whoever catches TidelogError catches all that tidelog raises on purpose."""
        for module in (shared, served):
            assert all(issubclass(kind, TidelogError) for kind in classes(module).values())

    def test_is_public(self) -> None:
        """Every shared error can be imported from the package."""
        assert classes(shared).keys() <= set(tidelog.__all__)
        assert all(getattr(tidelog, name) is kind for name, kind in classes(shared).items())

    def test_is_all_in_use(self) -> None:
        """Each error is raised somewhere, or is a kind of others that are."""
        used = raised_in(tidelog) | raised_in(tidelog_client) | raised_in(tidelog_server)
        for module in (shared, served):
            defined = classes(module)
            for name, kind in defined.items():
                is_a_group = any(issubclass(other, kind) and other is not kind for other in defined.values())
                assert name in used or is_a_group, f"nobody raises {name}"

    def test_explains_itself(self) -> None:
        """Every error has a docstring."""
        for module in (shared, served):
            for name, kind in classes(module).items():
                assert kind.__doc__, f"{name} has no docstring"


class TestTheServersTable:
    def test_has_a_row_for_all_that_ends_a_call(self) -> None:
        """Every error of the server's own has a row, and so does what a hook or a store may raise."""
        kinds = [kind for name, kind in classes(served).items() if name not in NOT_OVER_THE_NETWORK]
        kinds += [TransientError, shared.InvalidValue, shared.InvalidConstraint, shared.StorageError]
        kinds += [shared.DiskFull, shared.ResourceClosed, shared.LimitExceeded, shared.StoreInUse]

        for kind in kinds:
            assert any(issubclass(kind, row) for row, _, _ in STATUS), f"{kind.__name__} has no row"

    def test_puts_the_special_first(self) -> None:
        """No row is hidden behind a more general one."""
        for place, (kind, _, _) in enumerate(STATUS):
            for earlier, _, _ in STATUS[:place]:
                assert not issubclass(kind, earlier), f"{kind.__name__} is hidden behind {earlier.__name__}"

    def test_gives_each_reason_one_meaning(self) -> None:
        """A reason goes with one status code only, and is spelled like one."""
        codes: dict[str, set[grpc.StatusCode]] = {}
        for _, code, reason in STATUS:
            codes.setdefault(reason, set()).add(code)

        assert all(len(found) == 1 for found in codes.values())
        assert all(re.fullmatch(r"[A-Z][A-Z_]+[A-Z]", reason) for reason in codes)

    def test_says_nothing_of_what_is_not_in_it(self) -> None:
        """An error that nobody foresaw is INTERNAL, and its text stays on the server."""
        code, reason, message = status_of(ZeroDivisionError("the secret word is plugh"))

        assert (code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "plugh" not in message

    @pytest.mark.parametrize("kind", [shared.StorageError, shared.DiskFull, shared.ResourceClosed])
    def test_says_nothing_of_the_disk(self, kind: type[Exception]) -> None:
        """What a store says of its directory stays on the server."""
        _, _, message = status_of(kind("/var/lib/secret is full"))

        assert "secret" not in message
        assert message

    def test_keeps_messages_short(self) -> None:
        """A message that quotes half a database is cut, because a status is bounded."""
        for error in (TransientError("ü" * 100_000), served.RequestInvalid("\ud800" * 100_000)):
            _, _, message = status_of(error)
            assert 0 < len(message.encode()) <= 2_000

    def test_an_error_may_say_more(self) -> None:
        """What was asked for by name says what was not found."""
        assert status_of(served.NotFound("no", reason="OBJECT_NOT_FOUND"))[:2] == (
            grpc.StatusCode.NOT_FOUND,
            "OBJECT_NOT_FOUND",
        )


class TestTheReplicasTable:
    def told(self, code: grpc.StatusCode, reason: str) -> Transient | SynchronizationError:
        """Return what the replica makes of a status."""
        return error_of(Call(code, "why", reason), "host:1")

    def test_knows_every_row_of_the_servers(self) -> None:
        """Whatever the server may answer in a session is retried or has an error that tells what to do."""
        for kind, code, reason in STATUS:
            if reason in NOT_IN_A_SESSION:
                continue
            known = code in calls._TRANSIENT or reason in calls._BY_REASON or code in calls._BY_CODE
            assert known, f"the replica does not know what to make of {kind.__name__}: {code.name} {reason}"

    def test_has_no_reason_that_nobody_gives(self) -> None:
        """Each reason in the table is one that the server gives."""
        assert calls._BY_REASON.keys() <= {reason for _, _, reason in STATUS}

    def test_reaches_every_synchronization_error(self) -> None:
        """Each kind of SynchronizationError comes from a reason, from a status code, or from the replica itself."""
        mapped = {kind.__name__ for kind in (*calls._BY_REASON.values(), *calls._BY_CODE.values())}
        kinds = {
            name
            for name, kind in classes(shared).items()
            if issubclass(kind, SynchronizationError) and kind is not SynchronizationError
        }

        assert kinds == mapped | FOUND_BY_THE_REPLICA
        assert raised_in(tidelog_client) >= FOUND_BY_THE_REPLICA

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (served.AuthenticationFailed("x"), shared.Unauthenticated),
            (served.AuthenticationUnavailable("x"), Transient),
            (served.ProtocolVersionUnknown("x"), shared.ProtocolUnsupported),
            (served.OperationForked("x"), shared.ReplicaForked),
            (served.ReplicaOwned("x"), shared.PermissionRefused),
            (served.RequestInvalid("x"), shared.ProtocolViolated),
            (served.OperationsOutOfOrder("x"), shared.ProtocolViolated),
            (shared.InvalidValue("x"), shared.ProtocolViolated),
            (shared.InvalidConstraint("x"), shared.DownloadRefused),
            (served.SessionSuperseded("x"), Transient),
            (TransientError("x"), Transient),
            (shared.DiskFull("x"), Transient),
            (shared.ResourceClosed("x"), Transient),
            (shared.StorageError("x"), Transient),
            (ZeroDivisionError("x"), shared.ServerUnavailable),
        ],
    )
    def test_from_one_side_to_the_other(self, error: Exception, expected: type[Exception]) -> None:
        """What is raised on the server arrives as what a caller can act on; its reason can be read."""
        code, reason, message = status_of(error)

        arrived = error_of(Call(code, message, reason), "host:1")

        assert type(arrived) is expected
        assert "host:1" in str(arrived)
        assert message in str(arrived)

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            (grpc.StatusCode.UNAUTHENTICATED, shared.Unauthenticated),
            (grpc.StatusCode.PERMISSION_DENIED, shared.PermissionRefused),
            (grpc.StatusCode.UNIMPLEMENTED, shared.ProtocolUnsupported),
            (grpc.StatusCode.INVALID_ARGUMENT, shared.ProtocolViolated),
            (grpc.StatusCode.UNAVAILABLE, Transient),
            (grpc.StatusCode.ABORTED, Transient),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, Transient),
            (grpc.StatusCode.DEADLINE_EXCEEDED, Transient),
            (grpc.StatusCode.UNKNOWN, shared.ServerUnavailable),
            (grpc.StatusCode.DATA_LOSS, shared.ServerUnavailable),
        ],
    )
    def test_of_a_server_that_gives_no_reason(self, code: grpc.StatusCode, expected: type[Exception]) -> None:
        """Without a reason the status code decides; what nobody foresaw is an unavailable server."""
        assert type(self.told(code, "")) is expected
        assert type(self.told(code, "A_REASON_OF_LATER")) is expected


class TestWhatErrorsCarry:
    def test_facts_are_attributes(self) -> None:
        """What a program needs to know it does not read from the sentence."""
        missing = shared.ObjectNotFound(entity="Task", id="t1", unsaved={"b": 1, "a": None})
        assert (missing.entity, missing.id, missing.unsaved) == ("Task", "t1", {"b": 1, "a": None})
        assert "a, b" in str(missing)
        assert shared.ObjectNotFound(entity="Task", id="t1").unsaved == {}
        exists = shared.ObjectExists(entity="Task", id="t1")
        assert (exists.entity, exists.id) == ("Task", "t1")
        assert shared.LogCorrupt("x", seq=7).seq == 7
        unsupported = shared.FormatUnsupported("/x", found="a", supported="b")
        assert (unsupported.found, unsupported.supported) == ("a", "b")
        foreign = shared.ForeignServer(expected="a", actual="b")
        assert (foreign.expected, foreign.actual) == ("a", "b")

    def test_one_at_a_time_says_so_in_these_words(self) -> None:
        """The message about simultaneous synchronizations is a promise to the word."""
        assert str(shared.SynchronizationInProgress()) == (
            "Performing simultaneous synchronizations is not supported. "
            "Please try again after the current synchronization is completed."
        )

    def test_bad_values_are_value_errors(self) -> None:
        """Who knows nothing of tidelog may catch ValueError."""
        for kind in (shared.InvalidValue, shared.LimitExceeded, shared.InvalidConstraint, shared.InvalidSchema):
            assert issubclass(kind, ValueError)
