"""Schemas, as a program that uses tidelog declares them: checked for types, never run."""

from decimal import Decimal
from typing import assert_type

from tidelog import (
    Boolean,
    DecimalNumber,
    Entity,
    EntityReference,
    Enumeration,
    File,
    Integer,
    List,
    Reference,
    Rename,
    Schema,
    String,
    Timestamp,
    ValidationFailed,
)
from tidelog_client import Replica
from tidelog_server import Application

schema = Schema(
    [
        Entity(
            "Customer",
            {
                "number": Integer(required=True, minimum=1),
                "name": String(required=True, max_length=100, pattern=r"\S.*"),
                "vip": Boolean(default=False),
            },
            unique=["number", ("name", "vip")],
            indexes=["name"],
        ),
        Entity(
            "WorkOrder",
            {
                "customer": Reference("Customer", on_delete="restrict", required=True),
                "helpers": Reference("Customer", many=True, on_delete="clear"),
                "status": Enumeration(["open", "done"], default="open"),
                "photo": File(),
                "tags": List(String(), max_length=10),
                "due": Timestamp(),
                "hours": DecimalNumber(minimum=Decimal(0)),
            },
        ),
    ],
    version=3,
    renames=[
        Rename(version=3, entity="WorkOrder", attribute="state", to="status"),
        Rename(version=2, entity="Job", to="WorkOrder"),
    ],
)


def main():
    app = Application(schema=schema)
    assert_type(app.schema.version, int)
    assert_type(schema.references("WorkOrder"), tuple[EntityReference, ...])
    schema.save("schema.toml")
    with Replica("device-a", schema=Schema.load("schema.toml")) as replica:
        try:
            replica.create("Customer", {"number": -3})
        except ValidationFailed as failed:
            assert_type(failed.attribute, str)
            print(failed.entity, failed.id, failed.value, failed.rule, failed.is_mismatch)
