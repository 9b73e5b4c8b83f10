"""
The rules of a field service: dispatchers plan work orders, technicians carry them out, mostly offline.

Serve it with `tidelog serve application:app --tokens tokens.toml ...`, or from Python
as `walkthrough.py` does.
"""

from __future__ import annotations

import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Final

from tidelog import (
    DecimalNumber,
    Entity,
    Enumeration,
    File,
    Integer,
    Reference,
    Schema,
    String,
    attribute,
    claim,
)
from tidelog_server import Application, HookContext, HookObject, Principal, Reject

TOKENS_FILE: Final = Path(__file__).with_name("tokens.toml")
HOURLY_RATE: Final = Decimal("72.50")
CENT: Final = Decimal("0.01")

# --- what there is --------------------------------------------------------------------

SCHEMA: Final = Schema(
    [
        # Their ids are the user ids, so that a rule can compare a reference with who is calling.
        Entity("Technician", {"name": String(required=True, max_length=80)}),
        Entity(
            "Customer",
            {
                "name": String(required=True, min_length=1, max_length=80),
                "region": String(required=True),
                "address": String(),
                "discount": Integer(default=0, minimum=0, maximum=50),
            },
            indexes=["region"],
        ),
        Entity(
            "WorkOrder",
            {
                # Dispatchers create orders offline too; the server numbers them when they arrive.
                "number": Integer(),
                "title": String(required=True, min_length=1, max_length=120),
                # A customer with orders stays; orders of a technician who leaves are up for grabs.
                "customer": Reference("Customer", required=True, on_delete="restrict"),
                "technician": Reference("Technician", on_delete="clear"),
                "status": Enumeration(["open", "done", "archived"], default="open"),
                "hours": DecimalNumber(minimum=Decimal(0)),
                "labour": DecimalNumber(),
                "note": String(max_length=2_000),
            },
            unique=["number"],
            indexes=["technician"],
        ),
        # A van takes parts from the stock with `increment`: what several vans take adds up,
        # and whoever would take the last one twice is refused by the minimum.
        Entity(
            "Part",
            {"name": String(required=True), "stock": Integer(default=0, minimum=0)},
            unique=["name"],
        ),
        Entity(
            "PartUse",
            {
                "order": Reference("WorkOrder", required=True, on_delete="cascade"),
                "part": Reference("Part", required=True, on_delete="restrict"),
                "technician": Reference("Technician", on_delete="clear"),
                "quantity": Integer(required=True, minimum=1),
            },
            indexes=["technician"],
        ),
        # The file is a reference; the content travels on its own, and never twice.
        Entity(
            "Photo",
            {
                "order": Reference("WorkOrder", required=True, on_delete="cascade"),
                "technician": Reference("Technician", on_delete="clear"),
                "caption": String(max_length=200),
                "file": File(required=True),
            },
        ),
        Entity("Counter", {"value": Integer(required=True)}),
    ]
)

app = Application(schema=SCHEMA, operators=["operator"])

# --- who may do what ------------------------------------------------------------------

app.allow("dispatcher", "*", create=True, delete=True, write="*")
app.allow("operator", "*")

MINE: Final = attribute("technician") == claim("user_id")

app.allow("technician", "Technician")
app.allow("technician", "Part", write=["stock"])
app.allow(
    "technician",
    "Customer",
    read=["name", "region", "address"],  # the discount is none of their business, and never leaves the office
    where=attribute("region") == claim("region"),
)
app.allow(
    "technician",
    "WorkOrder",
    read=["number", "title", "customer", "technician", "status", "hours", "note"],
    write=["status", "hours", "note"],
    where=MINE,
)
app.allow("technician", "PartUse", create=True, write="*", where=MINE)
app.allow("technician", "Photo", create=True, delete=True, write="*", where=MINE)

# --- what devices get -----------------------------------------------------------------

# Archived orders stay on the server. Counters are its own.
app.synchronize("WorkOrder", ~(attribute("status") == "archived"))
app.synchronize("Counter", "never", uploads=False)

# --- what happens on the way ----------------------------------------------------------


@app.before_commit("WorkOrder")
def give_a_number(order: HookObject, context: HookContext) -> None:
    """Number a new order. The hook is part of the order's transaction, so a refused order leaves no gap."""
    if order["number"] is not None:
        return
    counter = context.get("Counter", "WorkOrder")
    if counter is None:
        order["number"] = 1
        context.create("Counter", {"value": 1}, id="WorkOrder")
    else:
        order["number"] = counter["value"] + 1
        context.update("Counter", "WorkOrder", {"value": order["number"]})


@app.before_commit("WorkOrder")
def close_with_hours(order: HookObject, _context: HookContext) -> None:
    """Refuse to close an order without the hours worked; with them, work out what the labour costs."""
    if order["status"] == "open":
        return
    if not order["hours"]:
        raise Reject("an order is closed with the hours that it took", code="HOURS_MISSING")
    order["labour"] = (order["hours"] * HOURLY_RATE).quantize(CENT)


@app.users
def who_is(tenant: str, user_id: str) -> Principal | None:
    """Say who a user is today: an operation that an operator retries is judged by its author's present rights."""
    for entry in tomllib.loads(TOKENS_FILE.read_text(encoding="utf-8"))["tokens"]:
        principal = Principal(entry["user_id"], roles=frozenset(entry["roles"]), claims=entry.get("claims", {}))
        if (principal.tenant, principal.user_id) == (tenant, user_id):
            return principal
    return None
