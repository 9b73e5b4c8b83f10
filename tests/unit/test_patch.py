from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from tests.builders import nested, packed

from tidelog import InvalidValue, LimitExceeded, Patch
from tidelog._patch import check_attributes, decode_patch, encoded_attributes, patch_setting
from tidelog._values import encode, equal


class TestApplying:
    @pytest.mark.parametrize(
        ("before", "patch", "after"),
        [
            ({"a": 1}, Patch(), {"a": 1}),
            ({"a": 1}, Patch({"a": 2, "b": 3}), {"a": 2, "b": 3}),
            ({"a": 1}, Patch({"a": None}), {"a": None}),
            ({"a": 1, "b": 2}, Patch(unset=("a", "c")), {"b": 2}),
            ({"n": 1}, Patch(increment={"n": 2}), {"n": 3}),
            ({"n": 1}, Patch(increment={"n": -3}), {"n": -2}),
            ({}, Patch(increment={"n": 2}), {"n": 2}),
            ({"n": None}, Patch(increment={"n": 2.5}), {"n": 2.5}),
            ({"n": 1.5}, Patch(increment={"n": 1}), {"n": 2.5}),
            ({"n": Decimal("0.1")}, Patch(increment={"n": Decimal("0.20")}), {"n": Decimal("0.30")}),
            ({"n": Decimal("0.1")}, Patch(increment={"n": 1}), {"n": Decimal("1.1")}),
            ({"n": 2**63 - 2}, Patch(increment={"n": 1}), {"n": 2**63 - 1}),
            ({"l": [1]}, Patch(add={"l": [2, 1, 2]}), {"l": [1, 2]}),
            ({"l": [1]}, Patch(add={"l": [1.0, True]}), {"l": [1, 1.0, True]}),
            ({"l": [1, 1]}, Patch(add={"l": [1]}), {"l": [1, 1]}),
            ({}, Patch(add={"l": []}), {"l": []}),
            ({"l": None}, Patch(add={"l": [[1]]}), {"l": [[1]]}),
            ({"l": [1, 2, 1, True]}, Patch(remove={"l": [1]}), {"l": [2, True]}),
            ({"l": [[1], {"a": 1}]}, Patch(remove={"l": [{"a": 1}]}), {"l": [[1]]}),
            ({}, Patch(remove={"l": [1]}), {"l": []}),
        ],
    )
    def test_what_comes_of_it(self, before: dict[str, Any], patch: Patch, after: dict[str, Any]) -> None:
        """A patch sets, removes, adds up, adds members and removes them; the argument stays as it was."""
        untouched = dict(before)

        assert equal(patch.apply(before), after)
        assert equal(before, untouched)

    @pytest.mark.parametrize(
        ("present", "patch"),
        [
            ("x", Patch(increment={"a": 1})),
            (True, Patch(increment={"a": 1})),
            ([], Patch(increment={"a": 1})),
            (1, Patch(increment={"a": 1.0})),
            (1, Patch(increment={"a": Decimal(1)})),
            (1.0, Patch(increment={"a": Decimal(1)})),
            (Decimal(1), Patch(increment={"a": 1.0})),
            (2**63 - 1, Patch(increment={"a": 1})),
            (-(2**63), Patch(increment={"a": -1})),
            (Decimal("9" * 128), Patch(increment={"a": 1})),
            (Decimal("1E+1000"), Patch(increment={"a": 1})),
            (Decimal("9E+999999999999999999"), Patch(increment={"a": Decimal("9E+999999999999999999")})),
            (1, Patch(add={"a": [1]})),
            ("abc", Patch(add={"a": ["a"]})),
            ({}, Patch(remove={"a": [1]})),
            ("x" * 1_000_000, Patch(increment={"a": 1})),
        ],
        ids=lambda one: repr(one)[:40],
    )
    def test_an_intent_that_does_not_fit(self, present: Any, patch: Patch) -> None:
        """An intent that the present value cannot take is an InvalidValue that names the attribute, in few words."""
        with pytest.raises(InvalidValue, match="'a'") as caught:
            patch.apply({"a": present})

        assert len(str(caught.value)) < 1_000

    def test_decimals_are_added_exactly(self) -> None:
        """No digit of a decimal is lost, whatever the arithmetic of the program rounds to."""
        long = Decimal("1" * 60)

        assert Patch(increment={"n": 1}).apply({"n": long}) == {"n": Decimal("1" * 59 + "2")}
        assert Patch(increment={"n": Decimal("0.001")}).apply({"n": long}) == {"n": Decimal("1" * 60 + ".001")}

    def test_what_it_writes(self) -> None:
        """A patch knows what it writes, and whether its result depends on what is there."""
        patch = Patch({"a": 1}, ("b",), {"c": 1}, {"d": [1]}, {"e": [1]})

        assert sorted(patch.written) == ["a", "b", "c", "d", "e"]
        assert patch.has_intents
        assert not Patch({"a": 1}, ("b",)).has_intents


class TestChecking:
    @pytest.mark.parametrize(
        "patch",
        [
            Patch({"": 1}),
            Patch({"a": object()}),
            Patch({"a": "\ud800"}),
            Patch({"a\0": 1}),
            Patch(unset=("",)),
            Patch(unset=(1,)),  # type: ignore[arg-type]
            Patch(unset=(["a"],)),  # type: ignore[arg-type]
            Patch(unset=("a", "a")),
            Patch({"a": 1}, unset=("a",)),
            Patch({"a": 1}, increment={"a": 1}),
            Patch(add={"a": [1]}, remove={"a": [2]}),
            Patch(increment={"a": True}),
            Patch(increment={"a": "1"}),
            Patch(increment={"a": None}),
            Patch(increment={"a": 2**63}),
            Patch(increment={"a": Decimal("NaN")}),
            Patch(add={"a": "abc"}),
            Patch(add={"a": [object()]}),
            Patch(remove={"a": {1: 2}}),
        ],
    )
    def test_what_makes_no_sense(self, patch: Patch) -> None:
        """A patch that nobody could take is an InvalidValue."""
        with pytest.raises(InvalidValue):
            patch.check()

    @pytest.mark.parametrize("make", [Patch, lambda value: Patch(add=value), lambda value: Patch(remove=value)])
    def test_nesting_is_what_the_other_side_can_read(self, make: Callable[[dict[str, Any]], Patch]) -> None:
        """A patch that passes its check can be read back; one level more is over the limit."""
        patch = make({"a": nested(30)})
        patch.check()
        assert decode_patch(patch.encode()) == patch

        with pytest.raises(LimitExceeded):
            make({"a": nested(31)}).check()

    def test_attributes(self) -> None:
        """Attributes of all plain types pass; a text with half a character does not."""
        check_attributes({"a": "x", "b": "é", "c": True, "d": 1.5, "e": b"", "f": None})
        for value in ("é\ud800", "\ud800", 2**63):
            with pytest.raises(InvalidValue):
                check_attributes({"a": value})


class TestSpelling:
    @pytest.mark.parametrize(
        "patch",
        [
            Patch(),
            Patch({"a": 1}),
            Patch({"a": {"b": [Decimal(1)]}}),
            Patch(unset=("a", "b")),
            Patch({"a": 1}, ("b",), {"c": 1.5}, {"d": [1]}, {"e": ["x"]}),
            Patch({f"attribute {n}": n for n in range(100)}),
        ],
    )
    def test_there_and_back(self, patch: Patch) -> None:
        """A patch reads back as it was written, the second time too, when its names are known."""
        data = patch.encode()

        assert decode_patch(data) == patch
        assert decode_patch(data) == patch

    def test_only_what_is_there_is_written(self) -> None:
        """Empty parts take no bytes; an empty patch is an empty set."""
        assert Patch().encode() == packed({"set": {}})
        assert Patch(unset=("a",)).encode() == packed({"unset": ["a"]})
        assert Patch({"a": 1}).encode() == packed({"set": {"a": 1}})

    @pytest.mark.parametrize(
        "value",
        [
            None,
            [],
            {"swap": {}},
            {"set": []},
            {"set": None},
            {"set": {}, "other": {}},
            {"unset": "a"},
            {"unset": {"a": 1}},
            {"unset": [1]},
            {"unset": [["a"]]},
            {"unset": [{}]},
            {"unset": [None]},
            {"unset": ["a", "a"]},
            {"unset": [""]},
            {"increment": []},
            {"increment": {"a": "1"}},
            {"increment": {"a": [1]}},
            {"add": {"a": 1}},
            {"remove": {"a": {"b": 1}}},
            {"set": {"a": 1}, "remove": {"a": []}},
            {"set": {"": 1}},
            {"set": {"a\0": 1}},
            {"set": {"x" * 65: 1}},
            {"set": {"a": nested(31)}},
        ],
        ids=repr,
    )
    def test_what_is_no_patch(self, value: Any) -> None:
        """Bytes that are no patch are an InvalidValue."""
        with pytest.raises(InvalidValue):
            decode_patch(packed(value))

    @pytest.mark.parametrize(
        "data", [b"", b"\xc1", b"\x81\xa3set", b"\x81\xa3set\x81\xa1a", packed({"set": {}}) + b"x"]
    )
    def test_what_is_no_messagepack(self, data: bytes) -> None:
        """Bytes that are no MessagePack, or too many, are an InvalidValue."""
        with pytest.raises(InvalidValue):
            decode_patch(data)

    def test_a_number_of_names_is_remembered_at_the_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Names that a hostile client invents do not pile up, and are checked each time."""
        monkeypatch.setattr("tidelog._values._KNOWN_NAMES", known := {"a"})
        monkeypatch.setattr("tidelog._values._KNOWN_NAMES_MAX", 3)
        for n in range(10):
            decode_patch(packed({"set": {f"invented {n}": 1}}))

        assert len(known) == 3
        with pytest.raises(LimitExceeded):
            decode_patch(packed({"set": {"a": 1, "x" * 65: 1}}))

    def test_attributes_inside_an_encoded_patch(self) -> None:
        """The attributes of a patch that only sets can be cut out of its bytes, and put back."""
        attributes = encode({"a": 1})

        assert encoded_attributes(Patch({"a": 1}).encode()) == attributes
        assert patch_setting(attributes) == Patch({"a": 1}).encode()
        assert encoded_attributes(Patch(unset=("a",)).encode()) is None
        assert encoded_attributes(Patch({"a": 1}, ("b",)).encode()) is None
