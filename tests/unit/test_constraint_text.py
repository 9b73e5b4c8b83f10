from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from tidelog import Constraint, InvalidConstraint, attribute, claim, parse_constraint
from tidelog._constraint_text import TEXT_CHARACTERS_MAX, parse_value
from tidelog._constraints import RESERVED_WORDS, All, Any_, Comparison
from tidelog._limits import CONSTRAINT_BYTES_MAX, CONSTRAINT_DEPTH_MAX, CONSTRAINT_PARTS_MAX
from tidelog._values import encode, equal

A, B, C = map(attribute, "abc")
USER, LEVEL = claim("user_id"), claim("https://example.com/level")
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


class TestForms:
    @pytest.mark.parametrize(
        ("text", "constraint"),
        [
            ("a == 1", A == 1),
            ("a != 1", A != 1),
            ("a < 1", A < 1),
            ("a <= 1", A <= 1),
            ("a > 1", A > 1),
            ("a >= 1", A >= 1),
            ("a in [1, 2]", A.is_in([1, 2])),
            ('a contains "x"', A.contains("x")),
            ("exists(a)", A.exists()),
            ("a == claim.user_id", A == USER),
            ("a in claim.regions", A.is_in(claim("regions"))),
            ("a == claim.`https://example.com/level`", A == LEVEL),
            ("not a == 1", ~(A == 1)),
            ("not not exists(a)", ~~A.exists()),
            ("not (a == 1 and exists(b))", ~((A == 1) & B.exists())),
            ("exists(a) and exists(b) and exists(c)", A.exists() & B.exists() & C.exists()),
            ("exists(a) and (exists(b) and exists(c))", All((A.exists(), B.exists() & C.exists()))),
            ("exists(a) and (exists(b) or exists(c))", A.exists() & (B.exists() | C.exists())),
            ("(exists(a) and exists(b)) or not exists(c)", (A.exists() & B.exists()) | ~C.exists()),
            ("all()", All(())),
            ("any()", Any_(())),
            ("all(exists(a))", All((A.exists(),))),
            ("any(exists(a) or exists(b))", Any_((A.exists() | B.exists(),))),
            ("exists(a) and any()", All((A.exists(), Any_(())))),
            ("`due date` == 1", attribute("due date") == 1),
            ("`a``b` == 1", attribute("a`b") == 1),
            ("`É` == 1", attribute("É") == 1),
            ("`and` == 1", attribute("and") == 1),
            ("claim == claim.claim", attribute("claim") == claim("claim")),
            ("t == 1", attribute("t") == 1),
        ],
    )
    def test_canonical(self, text: str, constraint: Constraint) -> None:
        """Each form of expression has one text, which reads back as that expression."""
        assert str(constraint) == text
        assert parse_constraint(text) == constraint

    @pytest.mark.parametrize(
        ("text", "constraint"),
        [
            ("  a==1\n", A == 1),
            ("a\u00a0==\t1", A == 1),
            ("((a == 1))", A == 1),
            ("`a` == 1", A == 1),
            ("É == 1", attribute("É") == 1),
            ("not a == 1 and b == 2", ~(A == 1) & (B == 2)),
            ("a == 1 and b == 2 or c == 3", ((A == 1) & (B == 2)) | (C == 3)),
            ("a == 1 or b == 2 and c == 3", (A == 1) | ((B == 2) & (C == 3))),
            ("not (a == 1) or b == 2", ~(A == 1) | (B == 2)),
            ("all(a == 1, b == 2)", (A == 1) & (B == 2)),
            ("any(a == 1, b == 2)", (A == 1) | (B == 2)),
            ("exists ( a )", A.exists()),
            ("a == claim . user_id", A == USER),
            ("a in [2,1 , 2]", A.is_in([2, 1, 2])),
            ('a=="x"and b==1', (A == "x") & (B == 1)),
        ],
    )
    def test_other_ways_to_write_it(self, text: str, constraint: Constraint) -> None:
        """Space, needless parentheses and quotes make no difference; and binds stronger than or, not strongest."""
        assert parse_constraint(text) == constraint

    @pytest.mark.parametrize("word", sorted(RESERVED_WORDS))
    def test_reserved_words(self, word: str) -> None:
        """A word of the language names an attribute, or a claim, only in backticks."""
        for constraint in (attribute(word).exists(), Comparison("a", "==", claim=word)):
            text = str(constraint)
            assert parse_constraint(text) == constraint
            with pytest.raises(InvalidConstraint):
                parse_constraint(text.replace("`", ""))


class TestValues:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("null", None),
            ("true", True),
            ("false", False),
            ("0", 0),
            ("-9223372036854775808", -(2**63)),
            ("1.0", 1.0),
            ("-0.0", -0.0),
            ("1e+300", 1e300),
            ("inf", float("inf")),
            ("-inf", float("-inf")),
            ("nan", float("nan")),
            ("12.50d", Decimal("12.50")),
            ("-1d", Decimal(-1)),
            ("1E+5d", Decimal("1E+5")),
            ('""', ""),
            (r'"a\"b\\c\n\u0000é"', 'a"b\\c\n\0é'),
            ('t"2026-01-31T12:00:00Z"', NOON),
            ('t"2026-01-31T12:00:00.000001Z"', NOON.replace(microsecond=1)),
            ('t"0001-01-01T00:00:00Z"', datetime(1, 1, 1, tzinfo=UTC)),
            ('b""', b""),
            ('b"AP8="', b"\0\xff"),
            ("[]", []),
            ("{}", {}),
            ('{"a": [1, {"b": null}], "b": 2.5}', {"b": 2.5, "a": [1, {"b": None}]}),
        ],
    )
    def test_canonical(self, text: str, value: Any) -> None:
        """Each value has one text, which reads back with its type and to the last digit."""
        constraint = Comparison("a", "==", value)
        back = parse_constraint(f"a == {text}")

        assert str(constraint) == str(back) == f"a == {text}"
        assert isinstance(back, Comparison)
        assert equal(back.value, value)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e5", 1e5),
            ("1E-5", 1e-5),
            ("-5.25e+2d", Decimal(-525)),
            (r'"\u00e9\/"', "é/"),
            ('t"2026-01-31T13:00:00+01:00"', NOON),
            ('t"2026-01-31T12:00:00.5Z"', NOON.replace(microsecond=500_000)),
        ],
    )
    def test_other_ways_to_write_it(self, text: str, value: Any) -> None:
        """What JSON, RFC 3339 and decimal notation allow is read."""
        assert parse_constraint(f"a == {text}") == Comparison("a", "==", value)


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected a comparison, at the end"),
            ("   ", "expected a comparison, at the end"),
            ("done", "expected one of == != < <= > >= in contains, at the end"),
            ("a = 1", "expected one of == != < <= > >= in contains, at character 3: = 1"),
            ("a == ", 'expected a value like "text", 3, 2.5, 12.50d, true, [1, 2] or claim.user_id, at the end'),
            (
                "status == open",
                'expected a value like "text", 3, 2.5, 12.50d, true, [1, 2] or claim.user_id, at character 11: open',
            ),
            ("a == 1 AND b == 2", "expected 'and', 'or' or the end, at character 8: AND b == 2"),
            ("a == 1 and", "expected a comparison, at the end"),
            ("(a == 1", "expected 'and', 'or' or ')', at the end"),
            ("a == 1)", "expected 'and', 'or' or the end, at character 7: )"),
            ("1 < a", "expected a comparison, at character 1: 1 < a"),
            ("a < 1 < 2", "expected 'and', 'or' or the end, at character 7: < 2"),
            ("exists a", "expected '(', at character 8: a"),
            ("exists(1)", "expected the name of an attribute, at character 8: 1)"),
            ("a == claim", "expected '.', at the end"),
            ("a == claim.1", "expected the name of a claim, at character 12: 1"),
            ('a == "x', 'what begins here in quotes has no end, at character 6: "x'),
            ("`a == 1", "what begins here in quotes has no end, at character 1: `a == 1"),
            (
                r'a == "\x"',
                r'a string has an escape or a control character that JSON does not know, at character 6: "\x"',
            ),
            ("a == [1 2]", "expected ',' or ']', at character 9: 2]"),
            ("a == [1,]", "expected a value like"),
            ("a == {x: 1}", "expected a key in quotes, at character 7: x: 1}"),
            ('a == {b"x": 1}', 'expected a key in quotes, at character 7: b"x": 1}'),
            ('a == {"x" 1}', "expected ':', at character 11: 1}"),
            ('a == {"x": 1, "x": 2}', "the map has the key 'x' twice, at character 15: \"x\": 2}"),
            ('a == t"2026-01-31"', 'this is not a timestamp like t"2026-01-31T12:00:00Z", at character 6'),
            ('a == t"2026-01-31T12:00:00"', "this is not a timestamp"),
            ('a == t"2026-02-30T12:00:00Z"', "this is not a timestamp"),
            ('a == t"2026-01-31T12:00:00.1234567Z"', "this is not a timestamp"),
            ('a == t"0001-01-01T00:00:00+01:00"', "outside the years 1 to 9999"),
            ('a == b"x"', 'this is not base64, at character 6: b"x"'),
            ('a == b"AP-_8="', "this is not base64"),
            ("a == 1e999", "a float is out of range, at character 6: 1e999"),
            ("a == 1E+9999999999999999999999d", "a decimal is out of range, at character 6: 1E+99999"),
            ("a == 1" + "0" * 200, "a number is longer than any value, at character 6: 1000"),
            ("a == 9223372036854775808", "integer over 64 bits: use Decimal, at character 1: a == 9223"),
            (r'a == "\ud800"', "holds a lone surrogate"),
            ("a == 1x", "expected a value like"),
            ("b == 1 or a < true", "attribute 'a': a bool has no order: use == != or in, at character 11: a < true"),
            ("a in 3", "attribute 'a': `in` needs a list of values, got int, at character 1: a in 3"),
            ("`" + "x" * 65 + "` == 1", "an attribute name is longer than 64 bytes"),
        ],
    )
    def test_what_and_where(self, text: str, message: str) -> None:
        """A text that makes no sense is an error that says what was expected, and where."""
        with pytest.raises(InvalidConstraint) as caught:
            parse_constraint(text)

        assert message in str(caught.value)


class TestLimits:
    def test_depth(self) -> None:
        """What may be nested deepest can be written, in every form of nesting; one level more is refused."""
        for around in (("not ", ""), ("(exists(a) and ", ")"), ("all(", ")")):
            text = "exists(a)"
            for _ in range(CONSTRAINT_DEPTH_MAX - 1):
                text = text.join(around)
            assert parse_constraint(text).facts.depth == CONSTRAINT_DEPTH_MAX

            with pytest.raises(InvalidConstraint, match="nested deeper than 32 levels"):
                parse_constraint(text.join(around))

    def test_parts(self) -> None:
        """So many comparisons and combinations can be written; one more is refused."""
        most = All((A.exists(),) * (CONSTRAINT_PARTS_MAX - 1))

        assert parse_constraint(str(most)) == most
        with pytest.raises(InvalidConstraint, match="more than 1000 comparisons"):
            parse_constraint(f"{most} and exists(a)")
        with pytest.raises(InvalidConstraint, match="more than 1000 comparisons"):
            parse_constraint(f"{most} and exists(a) and exists(a) and and")  # what follows is not even read

    @pytest.mark.parametrize("value", [False, "\0", -32, None, 1.0e-300, "", {"": None}, {"": [[]]}])
    def test_the_largest_has_a_text(self, value: Any) -> None:
        """The text of the largest constraint is within the limit of texts, whatever the value that fills it."""
        encoded = len(encode(value))
        constraint = A.is_in([value] * ((CONSTRAINT_BYTES_MAX - 20) // encoded))
        size = constraint.to_message().ByteSize()

        assert size > CONSTRAINT_BYTES_MAX - 20
        assert len(str(constraint)) / size < TEXT_CHARACTERS_MAX / CONSTRAINT_BYTES_MAX
        assert parse_constraint(str(constraint)) == constraint

    @pytest.mark.parametrize(
        "text",
        [
            "(" * TEXT_CHARACTERS_MAX,
            "not " * (TEXT_CHARACTERS_MAX // 4),
            "a == " + "[" * (TEXT_CHARACTERS_MAX // 2),
            "a == " + '{"":' * (TEXT_CHARACTERS_MAX // 5),
            "a < 1 or " * (TEXT_CHARACTERS_MAX // 9),
            "a == " + "1" * (TEXT_CHARACTERS_MAX // 2),
            "a == " + "0." + "1" * (TEXT_CHARACTERS_MAX // 2) + "x",
            'a == "' + "\\" * (TEXT_CHARACTERS_MAX // 2),
            "`" * (TEXT_CHARACTERS_MAX - 1),
            " " * TEXT_CHARACTERS_MAX,
            " " * (TEXT_CHARACTERS_MAX - 1) + "?",
            'a == "x" ' * (TEXT_CHARACTERS_MAX // 9),
            "a == 1" + " " * TEXT_CHARACTERS_MAX,
        ],
        ids=lambda text: text[:12],
    )
    def test_a_hostile_text(self, text: str) -> None:
        """A text that is all depth, or all length, is refused like any other."""
        with pytest.raises(InvalidConstraint) as caught:
            parse_constraint(text)

        assert len(str(caught.value)) < 200


class TestValuesAlone:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("null", None),
            (" true ", True),
            ("-1", -1),
            ("1e3", 1000.0),
            ("12.50d", Decimal("12.50")),
            (r'"a\u00e9\n"', "a\u00e9\n"),
            ('t"2026-01-31T12:00:00Z"', NOON),
            ('b"AP8="', b"\x00\xff"),
            ('[1, {"a": [null, 1.5d]}]', [1, {"a": [None, Decimal("1.5")]}]),
        ],
    )
    def test_are_read_as_in_a_constraint(self, text: str, value: Any) -> None:
        """A value is read as in a constraint."""
        assert equal(parse_value(text), value)

    @pytest.mark.parametrize(
        "text", ["", "milk", "1 2", "1 and true", "a == 1", "claim.level", "[1", '{"a" 1}', "[" * 99]
    )
    def test_that_are_none(self, text: str) -> None:
        """Anything else is refused, with what was expected."""
        with pytest.raises(InvalidConstraint):
            parse_value(text)
