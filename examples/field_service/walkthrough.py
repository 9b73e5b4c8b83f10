"""
A day of the field service, told and checked: run it with `python examples/field_service/walkthrough.py`.

Server, dispatcher and technicians run in this one process, each replica in a directory
of its own; the server listens on a free port of the loopback interface. Whatever is not
as told ends the program with an error.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import structlog
from application import SCHEMA, TOKENS_FILE, app

from tidelog import Patch
from tidelog.v1 import failure_pb2, failure_pb2_grpc
from tidelog_client import FileState, Replica, Report
from tidelog_server import Server, StaticTokens

TAKEN_BY_A_CAMERA: Final = bytes(range(256)) * 12_000


class Actors(NamedTuple):
    """Everybody with a device: the dispatcher and two technicians."""

    dora: Replica
    ann: Replica
    bob: Replica


class Orders(NamedTuple):
    """Ids of the orders of the day."""

    boiler: str
    heating: str
    leak: str


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="tidelog-field-service-") as name:
        folder = Path(name)
        with (
            Server(app, store=folder / "server", authenticator=StaticTokens.load(TOKENS_FILE)) as server,
            opened(folder, server.address) as actors,
            operator(server.address) as failures,
        ):
            orders = plan(actors.dora)
            set_out(actors)
            work_offline(actors, orders)
            come_back(actors, orders)
            take_too_much(actors, orders)
            close_in_a_hurry(actors, orders, failures)
            reassign(actors, orders)
            lose_a_customer(actors, orders)
    print("\nEverything was as told.")


def plan(dora: Replica) -> Orders:
    """Fill the office: people, customers, parts, and the orders of the day."""
    title("Dora, the dispatcher, plans the day; her orders get their numbers in the synchronization that brings them")
    with dora.transaction() as transaction:
        for user_id, name in (("ann", "Ann Archer"), ("bob", "Bob Baker")):
            transaction.create("Technician", {"name": name}, user_id)
        transaction.create("Customer", {"name": "Hotel Astra", "region": "north", "discount": 10}, "astra")
        transaction.create("Customer", {"name": "Café Blum", "region": "north", "address": "Ufer 3"}, "blum")
        transaction.create("Customer", {"name": "Gym Corpus", "region": "south"}, "corpus")
        transaction.create("Part", {"name": "Filter", "stock": 10}, "filter")
        orders = Orders(
            transaction.create("WorkOrder", {"title": "Service boiler", "customer": "astra", "technician": "ann"}),
            transaction.create("WorkOrder", {"title": "Bleed heating", "customer": "astra", "technician": "bob"}),
            transaction.create("WorkOrder", {"title": "Find the leak", "customer": "blum", "technician": "ann"}),
        )
    tell("dora", dora.synchronize_all())
    numbers = [shown(dora, "WorkOrder", order)["number"] for order in orders]
    check(numbers == [1, 2, 3], f"the hook numbered the orders: {numbers}")
    return orders


def set_out(actors: Actors) -> None:
    """Bring each technician what the access rules let them have."""
    title("Each technician gets what is theirs")
    for name, replica, expected in (("ann", actors.ann, 2), ("bob", actors.bob, 1)):
        tell(name, replica.synchronize_all())
        check(
            replica.count("WorkOrder") == expected, f"work orders on the device of {name}, all their own: {expected}"
        )
        check(replica.get("Customer", "corpus") is None, f"{name} has no customer of another region")
        astra = shown(replica, "Customer", "astra")
        check("discount" not in astra, f"{name} sees of Hotel Astra {sorted(astra)}, not the discount")


def work_offline(actors: Actors, orders: Orders) -> None:
    """Work without a network: parts are taken from the stock together with the note of who used them."""
    title("Both work in cellars without a network")
    use_part(actors.ann, "ann", orders.boiler, quantity=2)
    use_part(actors.bob, "bob", orders.heating, quantity=3)
    actors.ann.update("WorkOrder", orders.boiler, {"status": "done", "hours": Decimal("1.5")})
    actors.ann.create(
        "Photo",
        {
            "order": orders.boiler,
            "technician": "ann",
            "caption": "The new filter",
            "file": actors.ann.add_file(TAKEN_BY_A_CAMERA, name="filter.jpg"),
        },
    )
    for name, replica, stock in (("ann", actors.ann, 8), ("bob", actors.bob, 7)):
        say(f"{name} has {replica.pending_count()} pending operations")
        check(shown(replica, "Part", "filter")["stock"] == stock, f"{name} counts {stock} filters")


def come_back(actors: Actors, orders: Orders) -> None:
    """Synchronize: what was taken adds up, and what a hook works out is where it may be read."""
    title("Back in the network: what both took adds up")
    synchronize(actors)
    for name, replica in actors._asdict().items():
        check(shown(replica, "Part", "filter")["stock"] == 5, f"{name} counts 5 filters")
    done = shown(actors.dora, "WorkOrder", orders.boiler)
    check(done["labour"] == Decimal("108.75"), f"dora sees what the labour costs: {done['labour']}")
    check("labour" not in shown(actors.ann, "WorkOrder", orders.boiler), "ann does not")
    [photo] = actors.dora.query("Photo")
    check(photo.file_state("file") == FileState.PENDING, f"dora knows of {photo['file']['name']}, not yet its content")
    with actors.dora.open_file("Photo", photo.id, "file") as file:
        check(file.read() == TAKEN_BY_A_CAMERA, "it comes when she opens it")
    check(photo.file_state("file") == FileState.AVAILABLE, "and is there from then on")
    check(actors.ann.count("Photo") == 1, "ann, whose device downloads no photos, keeps what she took")


def take_too_much(actors: Actors, orders: Orders) -> None:
    """Take the same parts twice: the second commit group is refused as a whole."""
    title("Both take the last filters: the group that arrives second is refused as a whole, and kept")
    use_part(actors.ann, "ann", orders.leak, quantity=5)
    use_part(actors.bob, "bob", orders.heating, quantity=4)
    tell("ann", actors.ann.synchronize_all())
    report = actors.bob.synchronize_all()
    tell("bob", report)
    [failure] = report.failures
    check(report.rejected == 2, f"both operations of bob's group were refused: {failure.message}")
    check(len(failure.group_operations) == 2, "one failure keeps them together, with all that bob typed")
    check(shown(actors.bob, "Part", "filter")["stock"] == 0, "the stock is what ann left: none")
    check(actors.bob.count("PartUse") == 1, "and bob's device shows no use of what he did not get")


def close_in_a_hurry(actors: Actors, orders: Orders, failures: failure_pb2_grpc.FailureServiceStub) -> None:
    """Refuse an operation, let the operator mend it, and bring the result to the device."""
    title("Bob closes his order and forgets the hours; Olga, the operator, calls him, and mends it")
    actors.bob.update("WorkOrder", orders.heating, {"status": "done", "note": "All radiators are warm"})
    report = actors.bob.synchronize_all()
    tell("bob", report)
    check(report.failures[0].message == "an order is closed with the hours that it took", "the hook refused it")
    check(shown(actors.bob, "WorkOrder", orders.heating)["status"] == "open", "on bob's device it is open again")

    request = failure_pb2.ListFailuresRequest(
        entity="WorkOrder", statuses=[failure_pb2.FAILURE_STATUS_OPEN], user_id="bob"
    )
    [failure] = failures.ListFailures(request).failures
    say(f"olga reads {failure.code} of {failure.user_id}: {failure.operation_json}")
    [again] = failures.RetryFailure(failure_pb2.RetryFailureRequest(id=failure.id, note="a hiccup?")).results
    check(again.version == 0, f"a retry as it is meets the same hook: {again.message}")
    mended = Patch({"status": "done", "note": "All radiators are warm", "hours": Decimal("0.5")})
    [result] = failures.RetryFailure(
        failure_pb2.RetryFailureRequest(id=failure.id, patch=mended.encode(), note="bob said half an hour")
    ).results
    check(result.version > 0, "with the hours it is applied, as bob, and once")
    record = failures.GetFailure(failure_pb2.GetFailureRequest(id=failure.id)).failure
    check(
        [action.note for action in record.actions] == ["a hiccup?", "bob said half an hour"],
        "the record tells who tried what, and why",
    )

    tell("bob", actors.bob.synchronize_all())
    closed = shown(actors.bob, "WorkOrder", orders.heating)
    check((closed["status"], closed["hours"]) == ("done", Decimal("0.5")), f"bob's device learns of it: {closed}")


def reassign(actors: Actors, orders: Orders) -> None:
    """Give an order to somebody else: it leaves one device and comes to the other; what was typed is kept."""
    title("Ann's second order goes to Bob while she, offline, writes a note on it")
    tell("dora", actors.dora.synchronize_all())
    actors.dora.update("WorkOrder", orders.leak, {"technician": "bob"})
    tell("dora", actors.dora.synchronize_all())
    leak = actors.ann.get("WorkOrder", orders.leak)
    actors.ann.update("WorkOrder", orders.leak, {"note": "It is behind the bar"})
    report = actors.ann.synchronize_all()
    tell("ann", report)
    check(leak is not None and not leak.exists, "the order has left ann's device: her handle is empty")
    check(
        [failure.attributes for failure in report.failures] == [{"note": "It is behind the bar"}],
        f"her note is kept: {report.failures[0].reason}",
    )
    tell("bob", actors.bob.synchronize_all())
    check(shown(actors.bob, "WorkOrder", orders.leak)["title"] == "Find the leak", "bob has the order")


def lose_a_customer(actors: Actors, orders: Orders) -> None:
    """Delete a customer: refused while there are orders, whose deletion takes along what belongs to them."""
    title("Café Blum cancels: a customer with orders cannot be deleted, an order takes along what belongs to it")
    dora, ann = actors.dora, actors.ann
    dora.delete("Customer", "blum")
    report = dora.synchronize_all()
    tell("dora", report)
    check(dora.get("Customer", "blum") is not None, f"it is back: {report.failures[0].message}")
    check(ann.count("PartUse") == 2, "ann's device still has what she used at Hotel Astra and at Café Blum")
    with dora.transaction(atomic=True) as transaction:
        transaction.delete("WorkOrder", orders.leak)
        transaction.delete("Customer", "blum")
    synchronize(actors)
    for name, replica in actors._asdict().items():
        check(replica.get("Customer", "blum") is None, f"{name} has Café Blum no more")
    check(actors.bob.get("WorkOrder", orders.leak) is None, "nor has bob the order")
    check(
        [use["order"] for use in ann.query("PartUse")] == [orders.boiler],
        "with the order went what ann had used for it, though she had the order no more",
    )


# --- devices and the operator's desk ----------------------------------------------------


@contextmanager
def opened(folder: Path, address: str) -> Iterator[Actors]:
    """Open everybody's replica. With the schema, what does not fit it is refused before it is in the log."""

    def replica(name: str, **download: str) -> Replica:
        return Replica(
            folder / name,
            server=address,
            token=f"token-of-{name}",
            schema=SCHEMA,
            download=download,
            files={"Photo": "lazy"},
        )

    # Photos go up from the technicians' devices and stay there, but none come down to them.
    with (
        replica("dora") as dora,
        replica("ann", Photo="nothing_preserve") as ann,
        replica("bob", Photo="nothing_preserve") as bob,
    ):
        yield Actors(dora, ann, bob)


@contextmanager
def operator(address: str) -> Iterator[failure_pb2_grpc.FailureServiceStub]:
    """Open the operator's desk: the gRPC service that works off synchronization failures."""

    class Token(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            details = client_call_details._replace(metadata=[("authorization", "Bearer token-of-olga")])
            return continuation(details, request)

    with grpc.insecure_channel(address) as channel:
        yield failure_pb2_grpc.FailureServiceStub(grpc.intercept_channel(channel, Token()))


def use_part(replica: Replica, user_id: str, order: str, quantity: int) -> None:
    """Take filters from the stock for an order: both operations are applied, or none."""
    with replica.transaction(atomic=True) as transaction:
        transaction.create("PartUse", {"order": order, "part": "filter", "technician": user_id, "quantity": quantity})
        transaction.update("Part", "filter", increment={"stock": -quantity})


def synchronize(actors: Actors) -> None:
    """Synchronize everybody twice, so that each has what all others brought."""
    for _ in range(2):
        for name, replica in actors._asdict().items():
            tell(name, replica.synchronize_all())


def shown(replica: Replica, entity: str, id: str) -> dict[str, Any]:  # noqa: A002 - the glossary's word
    """Return an object as a replica shows it."""
    found = replica.get(entity, id)
    if found is None:
        raise SystemExit(f"not as told: {entity} {id} is not there")
    return found.to_dict()


# --- telling ----------------------------------------------------------------------------


def title(text: str) -> None:
    print(f"\n{text}")


def say(text: str) -> None:
    print(f"  {text}")


def tell(name: str, report: Report) -> None:
    """Say what a synchronization did."""
    say(
        f"{name} synchronizes: {report.applied} applied, {report.rejected} refused, "
        f"{report.downloaded} downloaded, {report.removed} removed"
    )


def check(holds: bool, what: str) -> None:  # noqa: FBT001 - what holds comes first
    """Say what should be so, and end the program if it is not."""
    if not holds:
        raise SystemExit(f"not as told: {what}")
    say(f"- {what}")


if __name__ == "__main__":
    main()
