from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

import tidelog
from tidelog import (
    AnyValue,
    Attribute,
    Boolean,
    Bytes,
    DecimalNumber,
    Entity,
    Enumeration,
    File,
    Float,
    Integer,
    InvalidSchema,
    List,
    Map,
    Reference,
    Schema,
    String,
    Timestamp,
    ValidationFailed,
)
from tidelog._attributes import ATTRIBUTE_TYPES
from tidelog._errors import QUOTED_CHARS_MAX

DAY = datetime(2024, 5, 1, tzinfo=UTC)
NAN, INFINITY = float("nan"), float("inf")
FILE = {"name": "a.png", "size": 0, "media_type": "image/png", "sha256": b"\0" * 32}
# What a program sees that is not checked for types.
untyped: Any = tidelog
SAMPLES = ["text", 1, 1.0, Decimal(1), True, DAY, b"bytes", [], {}]


def refusal(declared: Attribute, value: Any) -> str:
    """Return what is said of a value, or the empty string if it is accepted."""
    schema = Schema([Entity("A", {"a": declared}), Entity("B", {})])
    try:
        schema.check_object("A", {"a": value}, "a1")
    except ValidationFailed as error:
        failed = error
    else:
        return ""
    assert (failed.entity, failed.id, failed.attribute) == ("A", "a1", "a")
    assert failed.value is value
    assert not failed.is_mismatch
    assert str(failed).startswith("A 'a1': attribute 'a' is ")
    assert str(failed).endswith(failed.rule)
    return failed.rule


class TestValues:
    @pytest.mark.parametrize(
        ("declared", "kind", "said"),
        [
            (String(), str, "must be a string"),
            (Integer(), int, "must be an integer"),
            (Float(), float, "must be a float"),
            (DecimalNumber(), Decimal, "must be a decimal"),
            (Boolean(), bool, "must be true or false"),
            (Timestamp(), datetime, "must be a timestamp"),
            (Bytes(), bytes, "must be bytes"),
            (List(), list, "must be a list"),
            (Map(), dict, "must be a map"),
            (Enumeration(["text"]), str, "must be a string"),
            (Reference("B"), str, "must be the id of an object"),
            (Reference("B", many=True), list, "must be a list of ids"),
        ],
    )
    def test_have_the_declared_type(self, declared: Attribute, kind: type, said: str) -> None:
        """A value has exactly the declared type: an integer is no float, and true is no integer."""
        for value in SAMPLES:
            assert refusal(declared, value) == ("" if type(value) is kind else said)

    def test_of_any_type(self) -> None:
        """An attribute may be declared to hold anything, and a file to hold maps only."""
        assert [refusal(AnyValue(), value) for value in SAMPLES] == [""] * len(SAMPLES)
        assert all(refusal(File(), value) for value in SAMPLES)

    @pytest.mark.parametrize("kind", ATTRIBUTE_TYPES)
    def test_may_be_null(self, kind: Any) -> None:
        """Null and nothing are accepted wherever a value is not required, and nowhere else."""
        special: dict[Any, list[Any]] = {Enumeration: [["x"]], Reference: ["B"]}
        arguments = special.get(kind, [])
        assert refusal(kind(*arguments), None) == ""
        assert refusal(kind(*arguments, required=True), None) == "must have a value"
        with pytest.raises(ValidationFailed, match="A: attribute 'a' is null, but must have a value"):
            Schema([Entity("A", {"a": kind(*arguments, required=True)}), Entity("B", {})]).check_object("A", {})

    @pytest.mark.parametrize(
        ("declared", "good", "bad", "said"),
        [
            (String(min_length=2), ["ab"], ["a", ""], "must have at least 2 characters"),
            (String(max_length=2), ["", "äö", "\U0001f600\U0001f600"], ["abc"], "must have at most 2 characters"),
            (String(pattern="[a-z]+"), ["abc"], ["", "abc1", "abc\n", "Abc"], r"must match the pattern [a-z]+"),
            (String(pattern="a*"), ["a" * 1000], ["a" * 1001], "must match the pattern a*"),
            (String(pattern="a+", max_length=3), ["aaa"], ["aaaa"], "must have at most 3 characters"),
            (Integer(minimum=1), [1, 2**63 - 1], [0, -1], "must be at least 1"),
            (Integer(minimum=1, maximum=3), [1, 3], [4], "must be at most 3"),
            (Float(minimum=0.0), [0.0, -0.0, INFINITY], [-0.1, NAN], "must be at least 0.0"),
            (Float(maximum=0.0), [-INFINITY], [0.1, NAN], "must be at most 0.0"),
            (DecimalNumber(minimum=Decimal("0.1")), [Decimal("0.10")], [Decimal("0.09")], "must be at least 0.1"),
            (Timestamp(minimum=DAY), [DAY], [DAY - timedelta(microseconds=1)], f"must be at least {DAY}"),
            (Timestamp(maximum=DAY), [DAY], [DAY + timedelta(microseconds=1)], f"must be at most {DAY}"),
            (Bytes(max_length=2), [b"", b"\0\0"], [b"\0\0\0"], "must have at most 2 bytes"),
            (List(min_length=1), [[None]], [[]], "must have at least 1 members"),
            (List(String(), max_length=1), [["a"]], [["a", "b"]], "must have at most 1 members"),
            (Map(max_length=1), [{"a": 1}], [{"a": 1, "b": 2}], "must have at most 1 keys"),
            (Enumeration(["a", "b"]), ["a", "b"], ["c", "A", ""], "must be one of ['a', 'b']"),
        ],
    )
    def test_obey_the_rules(self, declared: Attribute, good: list[Any], bad: list[Any], said: str) -> None:
        """What is within the bounds is accepted, what is not is refused with the rule."""
        assert [refusal(declared, value) for value in good] == [""] * len(good)
        assert [refusal(declared, value) for value in bad] == [said] * len(bad)

    @pytest.mark.parametrize(
        ("declared", "value", "said"),
        [
            (List(Integer()), [1, 2, True], "its member 2 is True, which must be an integer"),
            (List(String()), ["a", None], "its member 1 is null, which must be a string"),
            (List(List()), [[], {}], "its member 1 is {}, which must be a list"),
            (Reference("B", many=True), ["b1", 5], "its member 1 is 5, which must be the id of an object"),
            (Reference("B", many=True), [""], "its member 0 is '', which must be the id of an object: 1 to 128 bytes"),
            (Reference("B"), "", "must be the id of an object: 1 to 128 bytes, no NUL"),
            (Reference("B"), "x" * 129, "must be the id of an object"),
            (Reference("B"), "a\0", "must be the id of an object"),
        ],
    )
    def test_of_members_and_ids(self, declared: Attribute, value: list[Any], said: str) -> None:
        """Members are asked one by one; null is no member, and what can be nobody's id is no reference."""
        assert refusal(declared, value).startswith(said)

    def test_of_members_that_fit(self) -> None:
        """Members of the declared type are accepted, and any where none is declared."""
        for declared, value in (
            (List(Integer()), [1, 2]),
            (List(Timestamp()), [DAY]),
            (List(), [1, None, "x"]),
            (Reference("B", many=True), ["b1", "b2"]),
            (Reference("B", many=True), []),
        ):
            assert refusal(declared, value) == ""

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": 1}, {"size": -1}, {"size": 1.0}, {"size": True}, {"media_type": None}, {"sha256": b"\0" * 31},
            {"sha256": "0" * 32}, {"more": 1},
        ],
    )  # fmt: skip
    def test_of_files(self, changes: dict[str, Any]) -> None:
        """A file is a map of exactly four parts."""
        assert refusal(File(), FILE) == ""
        assert "must be a file" in refusal(File(), FILE | changes)
        for name in FILE:
            assert "must be a file" in refusal(File(), {key: value for key, value in FILE.items() if key != name})

    @pytest.mark.parametrize("value", ["x" * 10_000, b"x" * 10_000, ["x" * 50] * 100, {"x" * 9_000: 1}])
    def test_are_quoted_short(self, value: Any) -> None:
        """A message quotes a long value cut short."""
        with pytest.raises(ValidationFailed) as caught:
            Schema([Entity("A", {"a": Integer()})]).check_object("A", {"a": value})

        assert len(str(caught.value)) <= QUOTED_CHARS_MAX + 60
        assert "..., but must be an integer" in str(caught.value)


class TestDeclarations:
    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: untyped.String(required=1), "String: required is 1, but must be True or False"),
            (lambda: untyped.Integer(minimum="1"), "Integer: minimum is '1', but must be an integer"),
            (lambda: untyped.Integer(minimum=True), "Integer: minimum is True, but must be an integer"),
            (lambda: untyped.Integer(maximum=1.0), "Integer: maximum is 1.0, but must be an integer"),
            (lambda: untyped.Integer(maximum=2**63), "Integer: maximum is an integer over 64 bits"),
            (lambda: untyped.Integer(minimum=3, maximum=2), "Integer: minimum 3 is above maximum 2"),
            (lambda: untyped.Float(minimum=0), "Float: minimum is 0, but must be a float"),
            (lambda: untyped.Float(minimum=NAN), "Float: minimum is nan, but must be finite"),
            (lambda: untyped.Float(maximum=INFINITY), "Float: maximum is inf, but must be finite"),
            (lambda: untyped.Float(default=-INFINITY), "Float: the default is -inf, but must be finite"),
            (lambda: untyped.DecimalNumber(minimum=0), "DecimalNumber: minimum is 0, but must be a decimal"),
            (
                lambda: untyped.DecimalNumber(maximum=Decimal("NaN")),
                "DecimalNumber: maximum is a decimal that is not finite",
            ),
            (
                lambda: untyped.Timestamp(minimum=DAY.replace(tzinfo=None)),
                "Timestamp: minimum is a datetime without a time zone",
            ),
            (
                lambda: untyped.Timestamp(minimum=DAY, maximum=DAY - timedelta(1)),
                "Timestamp: minimum .* is above maximum",
            ),
            (lambda: untyped.Timestamp(default=DAY.date()), "Timestamp: the default is a date"),
            (lambda: untyped.String(min_length=-1), "String: min_length is -1, but must be an integer from 0"),
            (lambda: untyped.String(max_length=1.5), "String: max_length is 1.5, but must be an integer from 0"),
            (lambda: untyped.Bytes(max_length=True), "Bytes: max_length is True"),
            (lambda: untyped.List(min_length=2, max_length=1), "List: min_length 2 is above max_length 1"),
            (lambda: untyped.String(pattern="("), "String: pattern '\\(' is no regular expression: missing"),
            (
                lambda: untyped.String(pattern=""),
                "String: pattern is '', but must be a string of 1 to 1000 characters",
            ),
            (lambda: untyped.String(pattern="x" * 1001), "String: pattern is 'xxx"),
            (lambda: untyped.String(pattern=b"x"), "String: pattern is b'x'"),
            (lambda: untyped.String(pattern="\ud800"), "String: pattern holds a lone surrogate"),
            (
                lambda: untyped.Enumeration([]),
                "Enumeration: values is \\[\\], but must be a list of 1 to 1000 strings",
            ),
            (
                lambda: untyped.Enumeration([str(n) for n in range(1001)]),
                "Enumeration: values is .* 1 to 1000 strings",
            ),
            (lambda: untyped.Enumeration("ab"), "Enumeration: values is 'ab', but must be a list"),
            (lambda: untyped.Enumeration([1]), "Enumeration: 1 is among the values, but is no string"),
            (lambda: untyped.Enumeration(["\ud800"]), "Enumeration: a value holds a lone surrogate"),
            (lambda: untyped.Enumeration(["a", "b", "a"]), "Enumeration: 'a' is twice among the values"),
            (lambda: untyped.Reference("B", many=1), "Reference: many is 1, but must be True or False"),
            (
                lambda: untyped.Reference("B", on_delete="drop"),
                "Reference: on_delete is 'drop', but must be one of restrict, ",
            ),
            (
                lambda: untyped.Reference("B", on_delete="clear", required=True),
                "Reference: a required reference cannot be",
            ),
            (
                lambda: untyped.List(Reference("B")),
                "List: member is Reference.* but must be one of String\\(\\), Integer",
            ),
            (lambda: untyped.List(File()), "List: member is File"),
            (lambda: untyped.List(String), "List: member is <class"),
            (
                lambda: untyped.List(String(max_length=3)),
                "List: member is String.*but members have a type and no rules",
            ),
        ],
    )
    def test_that_contradict_themselves(self, make: Any, said: str) -> None:
        """A declaration that makes no sense is refused on its own line, with the option in the message."""
        with pytest.raises(InvalidSchema, match=f"^{said}"):
            make()

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: untyped.String(default=1), "String: the default is 1, but must be a string"),
            (
                lambda: untyped.String(default="abc", max_length=2),
                "String: the default is 'abc', but must have at most 2",
            ),
            (lambda: untyped.String(default="A", pattern="[a-z]"), "String: the default is 'A', but must match"),
            (lambda: untyped.Integer(default=0, minimum=1), "Integer: the default is 0, but must be at least 1"),
            (lambda: untyped.Integer(default=2**63), "Integer: the default is an integer over 64 bits"),
            (lambda: untyped.Float(default=1), "Float: the default is 1, but must be a float"),
            (lambda: untyped.DecimalNumber(default=Decimal(2), maximum=Decimal(1)), "DecimalNumber: the default is"),
            (lambda: untyped.Boolean(default=0), "Boolean: the default is 0, but must be true or false"),
            (lambda: untyped.Timestamp(default="2024"), "Timestamp: the default is '2024', but must be a timestamp"),
            (lambda: untyped.Bytes(default="x"), "Bytes: the default is 'x', but must be bytes"),
            (lambda: untyped.Enumeration(["a"], default="b"), "Enumeration: the default is 'b', but must be one of"),
            (lambda: untyped.List(default=()), "List: the default is a tuple"),
            (lambda: untyped.List(Integer(), default=["x"]), "List: the default is .*'x'.*, but its member 0 is 'x'"),
            (lambda: untyped.List(default=[None]), "List: the default holds null, but must be made of strings"),
            (lambda: untyped.List(default=[{"a": [DAY]}]), "List: the default holds datetime"),
            (lambda: untyped.Map(default={"a": Decimal(1)}), "Map: the default holds Decimal"),
            (lambda: untyped.Map(default={"a": NAN}), "Map: the default holds nan"),
            (lambda: untyped.Map(default={1: 1}), "Map: the default has a map key that is no string"),
            (lambda: untyped.Map(default=[]), "Map: the default is \\[\\], but must be a map"),
        ],
    )
    def test_with_a_default_that_breaks_its_own_rule(self, make: Any, said: str) -> None:
        """A default is a value like any other, and one that a schema file can tell."""
        with pytest.raises(InvalidSchema, match=f"^{said}"):
            make()

    def test_of_a_required_list_of_references_that_is_cleared(self) -> None:
        """A list of ids may lose members and still be there."""
        assert Reference("B", many=True, required=True, on_delete="clear").required

    def test_moments_are_kept_in_utc(self) -> None:
        """Two declarations that name the same moment are the same."""
        elsewhere = DAY.astimezone(timezone(timedelta(hours=2)))

        assert Timestamp(default=elsewhere, minimum=elsewhere).default == DAY
        assert repr(Timestamp(default=elsewhere, maximum=elsewhere)) == repr(Timestamp(default=DAY, maximum=DAY))

    def test_are_their_own(self) -> None:
        """A declaration does not change, nor when a list that it was made from does."""
        default, values = ["a"], ["a", "b"]
        declared, choice = List(default=default), Enumeration(values)

        default.append("b")
        values.append("c")

        assert declared.default == ["a"]
        assert choice.values == ("a", "b")
        with pytest.raises(AttributeError):
            declared.max_length = 3  # type: ignore[misc]

    def test_of_no_type(self) -> None:
        """What every declaration has in common is none by itself."""
        with pytest.raises(InvalidSchema):
            Entity("A", {"a": Attribute()})
