from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.property.strategies import attributes, checked, mutated, operations, patches, values

from tidelog import InvalidValue, Operation, Patch
from tidelog._failure import operation_as_data
from tidelog._operation import decode_operation, identity_of
from tidelog._patch import decode_patch
from tidelog._values import (
    as_json,
    check,
    copied,
    decode,
    decode_flat_map,
    decode_map,
    decode_trusted,
    encode,
    equal,
    sort_key,
)

pytestmark = pytest.mark.slow


class TestValues:
    @checked
    @given(values)
    def test_there_and_back(self, value: Any) -> None:
        """Every value comes back equal, type included, and encodes the same again."""
        check(value)
        data = encode(value)

        assert equal(decode(data), value)
        assert equal(decode_trusted(data), value)
        assert equal(copied(value), value)
        assert encode(decode(data)) == data

    @checked
    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        """Any bytes are a value or an InvalidValue; what is read can be written, and read again."""
        try:
            value = decode(data)
        except InvalidValue:
            return
        check(value)
        assert equal(decode(encode(value)), value)

    @checked
    @given(mutated(values.map(encode)))
    def test_damaged_bytes(self, data: bytes) -> None:
        """Bytes that were a value before they were damaged are a value or an InvalidValue."""
        try:
            value = decode(data)
        except InvalidValue:
            return
        check(value)
        assert equal(decode(encode(value)), value)

    @checked
    @given(attributes.map(encode) | mutated(attributes.map(encode)) | st.binary(max_size=50))
    def test_the_quick_way_says_the_same(self, data: bytes) -> None:
        """A map that is read the quick way is the one that the full way reads, but for keys that are no names."""
        quick = decode_flat_map(data)
        if quick is None or not all(type(name) is str for name in quick):
            return
        assert equal(decode_map(data), quick)

    @checked
    @given(st.lists(values, max_size=6))
    def test_any_values_have_one_order(self, some: list[Any]) -> None:
        """Whatever order values come in, they are sorted into the same."""
        turned = list(reversed(some))
        forwards = [sort_key(value) for value in sorted(some, key=sort_key)]
        backwards = [sort_key(value) for value in sorted(turned, key=sort_key)]

        assert forwards == backwards

    @checked
    @given(values)
    def test_as_json(self, value: Any) -> None:
        """Every value can be shown as JSON that any program reads."""
        json.loads(as_json(value), parse_constant=pytest.fail)


class TestPatches:
    @checked
    @given(patches())
    def test_there_and_back(self, patch: Patch) -> None:
        """Every patch comes back as it was, the second time too."""
        patch.check()
        data = patch.encode()

        for _ in range(2):
            found = decode_patch(data)
            assert found.unset == patch.unset
            for name in ("set", "increment", "add", "remove"):
                assert equal(getattr(found, name), getattr(patch, name))

    @checked
    @given(mutated(patches().map(Patch.encode)) | st.binary(max_size=100))
    def test_damaged_bytes(self, data: bytes) -> None:
        """Bytes that are no patch are an InvalidValue; what is read passes the check for programs too."""
        try:
            patch = decode_patch(data)
        except InvalidValue:
            return
        patch.check()
        assert sorted(decode_patch(patch.encode()).written) == sorted(patch.written)


class TestOperations:
    @checked
    @given(operations())
    def test_there_and_back(self, operation: Operation) -> None:
        """Every operation comes back as it was, and shows its identity."""
        data = operation.encode()

        assert decode_operation(data) == operation
        assert identity_of(data) == (operation.seq, operation.nonce)
        operation.decoded_patch()

    @checked
    @given(mutated(operations().map(Operation.encode)) | st.binary(max_size=100))
    def test_damaged_bytes(self, data: bytes) -> None:
        """Bytes that are no operation are an InvalidValue; what is read can be shown and written again."""
        seq, nonce = identity_of(data)
        assert 0 <= seq < 2**63
        assert 0 <= nonce < 2**64
        try:
            operation = decode_operation(data)
        except InvalidValue:
            return
        assert (operation.seq, operation.nonce) == (seq, nonce)
        json.loads(as_json(operation_as_data(operation)))
        assert decode_operation(operation.encode()) == operation
        try:
            operation.decoded_patch()
        except InvalidValue:
            return
