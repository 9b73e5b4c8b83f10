"""
Values: what an attribute can hold, and its MessagePack form.

null, bool, 64-bit integer, float, string, bytes, timestamp, decimal, list, map.
They travel and are stored in one encoding, MessagePack, so that bytes can pass
from the log to the wire to the store without being rebuilt. Timestamps are the
standard extension type -1; decimals are extension type 1 with ASCII text.

Decoding never trusts its input. Whatever is wrong with the bytes becomes an
`InvalidValue` with a sentence that says what, whoever sent them.

Equality is type plus value: 1, 1.0 and True are three different values. Python
thinks otherwise, hence `equal`.
"""

from __future__ import annotations

import base64
import decimal
import json
import math
import re
import threading
from collections.abc import Hashable
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, TypeAlias, cast

import msgpack
import msgspec

from tidelog._errors import InvalidValue, LimitExceeded, damaged
from tidelog._limits import ID_BYTES_MAX, NAME_BYTES_MAX, NESTING_DEPTH_MAX

Value: TypeAlias = bool | int | float | str | bytes | datetime | Decimal | list["Value"] | dict[str, "Value"] | None
Attributes: TypeAlias = dict[str, Any]

DECIMAL_EXTENSION: Final = 1
DECIMAL_BYTES_MAX: Final = 128
_DECIMAL: Final = re.compile(rb"-?[0-9]+(\.[0-9]+)?(E[+-]?[0-9]+)?")
INTEGER_MIN: Final = -(2**63)
INTEGER_MAX: Final = 2**63 - 1
EMPTY_MAP: Final = b"\x80"

_WIDE: Final = decimal.Context(prec=4 * DECIMAL_BYTES_MAX, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)
_CONTAINERS: Final = frozenset((list, dict))
_SCALARS: Final = frozenset((type(None), bool, int, float, str, bytes, datetime, Decimal))
# Of these types both libraries read the same.
_PLAIN_SCALARS: Final = frozenset((type(None), bool, int, float, str, bytes))
_decode_quickly: Final = msgspec.msgpack.Decoder(dict[str, Any]).decode


# Names that passed `check_name`. They repeat with every operation, and the check costs more than the
# look-up; the bound keeps a hostile client's inventions from piling up.
_KNOWN_NAMES: Final[set[str]] = set()
_KNOWN_NAMES_MAX: Final = 10_000


def encode(value: Any) -> bytes:
    """
    Encode a value that `check` has accepted, or that was decoded.

    Raises:
        InvalidValue: The value is none that tidelog can hold.
    """
    try:
        return _PACKER.pack(value)
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError) as error:
        _PACKER.reset()
        raise InvalidValue(f"a value cannot be stored: {error}") from error


def decode(data: bytes) -> Any:
    """
    Decode bytes that came from outside.

    Raises:
        InvalidValue: The bytes are not one well-formed value, or hold what no
            value may hold: a duplicate key, a key that is no string, an unknown
            extension type, an integer over 64 bits, nesting deeper than 32.
    """
    try:
        value = msgpack.unpackb(
            data,
            object_pairs_hook=_map_without_duplicates,
            ext_hook=_decode_extension,
            timestamp=3,
        )
    except InvalidValue:
        raise
    except (ValueError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        what = str(error) or type(error).__name__
        raise InvalidValue(f"not a MessagePack value that tidelog can hold: {what}") from error
    _check_decoded(value, 0)
    return value


def decode_map(data: bytes) -> Attributes:
    """Decode bytes that came from outside and must be a map. Raises InvalidValue."""
    value = decode(data)
    if type(value) is not dict:
        raise InvalidValue(f"expected a MessagePack map, got {type(value).__name__}")
    return value


def decode_flat_map(data: bytes) -> Attributes | None:
    """
    Decode a map that came from outside, if it is as plain as nearly all are; None: use `decode_map`.

    Plain is a map of scalars and lists of scalars. What `decode` learns by looking at
    every pair is seen here from the outside: the map's header says how many keys
    there must be, and without a byte 0xcf there is no integer over 63 bits. The
    caller checks that the keys are names.

    Raises:
        InvalidValue: As `decode`.
    """
    if b"\xcf" in data:
        return None
    header = data[:1]
    if b"\x80" <= header <= b"\x8f":
        count = data[0] & 0x0F
    elif header == b"\xde" and len(data) >= 3:  # noqa: PLR2004 - a 16-bit length
        count = data[1] << 8 | data[2]
    else:
        return None
    try:
        value = msgpack.unpackb(data, ext_hook=_decode_extension, timestamp=3)
    except (InvalidValue, ValueError, OverflowError, msgpack.UnpackException):
        return None  # `decode_map` says what is wrong
    if len(value) != count:
        return None
    for member in value.values():
        kind = type(member)
        if kind is dict or (kind is list and not _CONTAINERS.isdisjoint(map(type, member))):
            return None
    return cast("Attributes", value)


def check_encoded_map(data: bytes) -> None:
    """
    Check that bytes from outside are a map that can be stored, and read by `decode_trusted`.

    Raises:
        InvalidValue: They are not.
    """
    try:
        plain = _decode_quickly(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        plain = None  # `decode_map` says what is wrong
    if plain is not None and b"\xcf" not in data:
        for member in plain.values():  # in a loop: a call for each map costs more than most maps have members
            kind = type(member)
            if kind not in _PLAIN_SCALARS and not (kind is list and _PLAIN_SCALARS.issuperset(map(type, member))):
                break
        else:
            return
    decode_map(data)


def decode_trusted(data: bytes) -> Any:
    """
    Decode bytes that `decode` accepted before they were stored. Skips its checks.

    Raises:
        StorageError: They are no value any more.
    """
    try:
        return msgpack.unpackb(data, ext_hook=_decode_extension, timestamp=3)
    except (ValueError, OverflowError, msgpack.UnpackException) as error:
        raise damaged("a stored value") from error


def check(value: Any, what: str = "value", depth: int = 1) -> None:
    """
    Check a value that a program handed over.

    Raises:
        InvalidValue: It is none that tidelog can hold; the message starts with *what*.
    """
    kind = type(value)
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidValue(f"{what} holds a lone surrogate, which no encoding can carry") from None
    elif kind is int:
        if not INTEGER_MIN <= value <= INTEGER_MAX:
            raise InvalidValue(f"{what} is an integer over 64 bits: use Decimal")
    elif kind is list or kind is dict:
        if depth > NESTING_DEPTH_MAX:
            raise LimitExceeded(f"{what} is nested deeper than {NESTING_DEPTH_MAX} levels")
        if kind is dict:
            for key, member in value.items():
                if type(key) is not str:
                    raise InvalidValue(f"{what} has a map key that is no string: {key!r}")
                check(key, what, depth + 1)
                check(member, what, depth + 1)
        else:
            for member in value:
                check(member, what, depth + 1)
    elif kind is datetime:
        if value.utcoffset() is None:
            raise InvalidValue(f"{what} is a datetime without a time zone: timestamps are UTC")
        try:
            value.astimezone(UTC)
        except OverflowError:
            raise InvalidValue(f"{what} is outside the years 1 to 9999 in UTC") from None
    elif kind is Decimal:
        if not value.is_finite() or len(str(value)) > DECIMAL_BYTES_MAX:
            raise InvalidValue(f"{what} is a decimal that is not finite or longer than {DECIMAL_BYTES_MAX} digits")
    elif kind not in _SCALARS:
        raise InvalidValue(
            f"{what} is a {kind.__name__}: use None, bool, int, float, str, bytes, datetime, Decimal, list or dict"
        )


def check_name(name: str, what: str) -> None:
    """Check the name of an entity or attribute: 1 to 64 bytes, no NUL. Raises InvalidValue."""
    if type(name) is not str or name not in _KNOWN_NAMES:
        _check_text(name, what, NAME_BYTES_MAX)
        if len(_KNOWN_NAMES) < _KNOWN_NAMES_MAX:
            _KNOWN_NAMES.add(name)


def are_known_names(names: AbstractSet[str]) -> bool:
    """Tell quickly that `check_name` accepts all of these. False: ask it."""
    return names <= _KNOWN_NAMES


def check_id(id_: str, what: str = "an id") -> None:
    """Check the id of an object, or of a user: 1 to 128 bytes, no NUL. Raises InvalidValue."""
    if type(id_) is str and 0 < len(id_) <= ID_BYTES_MAX and id_.isascii() and "\0" not in id_:
        return
    _check_text(id_, what, ID_BYTES_MAX)


def copied(value: Any) -> Any:
    """Return a value whose lists and maps are its own."""
    kind = type(value)
    if kind is dict:
        return {key: copied(member) for key, member in value.items()}
    if kind is list:
        return [copied(member) for member in value]
    return value


def equal(left: Any, right: Any) -> bool:
    """Tell whether two values have the same type and the same value. NaN equals NaN: it is one value."""
    kind = type(left)
    if kind is not type(right):
        return False
    if kind is dict:
        return len(left) == len(right) and all(key in right and equal(left[key], right[key]) for key in left)
    if kind is list:
        return len(left) == len(right) and all(map(equal, left, right))
    if kind is float and left != left:
        return bool(right != right)
    return bool(left == right)


def decimal_text(value: Decimal) -> str:
    """Return one spelling for all decimals of a value, exactly, however many digits it has."""
    return str(value.normalize(_WIDE)) if value else "0"


def identity(value: Any) -> Hashable:
    """Return a key that two values share exactly if they are `equal`."""
    kind = type(value)
    if kind is list:
        return (kind, tuple(map(identity, value)))
    if kind is dict:
        return (kind, frozenset((key, identity(member)) for key, member in value.items()))
    if kind is Decimal:
        # Its own hash is one that a hostile author can make collide.
        return (kind, decimal_text(value))
    if kind is float and value != value:
        return (kind, "NaN")
    return (kind, value)


_TYPE_RANK: Final = {
    type(None): 0, bool: 1, int: 2, float: 2, Decimal: 2, str: 3, bytes: 4, datetime: 5, list: 6, dict: 7,
}  # fmt: skip


def sort_key(value: Any) -> tuple[int, Any]:
    """
    Give a key that puts any values into one total order.

    Null and missing first, then false and true, numbers by magnitude, strings by
    code point, binaries, timestamps; lists and maps by their encoding.
    """
    rank = _TYPE_RANK[type(value)]
    if rank == 0:
        return (0, 0)
    if rank == 2:  # noqa: PLR2004 - the rank of numbers, two lines up
        return (2, -math.inf) if value != value else (2, value)
    if rank >= 6:  # noqa: PLR2004 - the ranks of containers
        return (rank, encode(value))
    return (rank, value)


def as_json(value: Any) -> str:
    """
    Return a value as JSON for people and scripts.

    Binaries become base64 text, timestamps RFC 3339 text, decimals their digits as
    text; floats that JSON cannot hold become text.
    """
    return json.dumps(_plain(value), ensure_ascii=False)


def literal(value: Any) -> str:
    """
    Return a value as constraints spell it: as JSON, and what JSON lacks in a way of its own.

    `12.50d` is a decimal, `t"2026-01-31T12:00:00Z"` a timestamp, `b"AP8="` a binary in base64,
    `inf` and `nan` are floats. Nothing is lost, and the keys of a map are in order.
    """
    kind = type(value)
    if kind is dict:
        return "{" + ", ".join(f"{literal(key)}: {literal(value[key])}" for key in sorted(value)) + "}"
    if kind is list:
        return "[" + ", ".join(map(literal, value)) + "]"
    if kind is bytes:
        return f'b"{base64.b64encode(value).decode()}"'
    if kind is datetime:
        return f't"{value.astimezone(UTC).replace(tzinfo=None).isoformat()}Z"'
    if kind is Decimal:
        return f"{value}d"
    if kind is float:
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is dict:
        return {key: _plain(member) for key, member in value.items()}
    if kind is list or kind is tuple:
        return [_plain(member) for member in value]
    if kind is bytes:
        return base64.b64encode(value).decode()
    if kind is datetime:
        return value.isoformat()
    if kind is Decimal or (kind is float and not math.isfinite(value)):
        return str(value)
    return value


def _check_text(text: str, what: str, bytes_max: int) -> None:
    if type(text) is not str or not text:
        raise InvalidValue(f"{what} must be a string that is not empty, got {text!r}")
    if text.isascii():
        size = len(text)
    else:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise InvalidValue(f"{what} holds a lone surrogate: {text!r}") from None
    if size > bytes_max:
        raise LimitExceeded(f"{what} is longer than {bytes_max} bytes: {text[:40]!r}...")
    if "\0" in text:
        raise InvalidValue(f"{what} holds a NUL: {text!r}")


def _check_decoded(value: Any, depth: int) -> None:
    """Check what the decoder itself cannot: depth and the upper half of unsigned integers."""
    kind = type(value)
    if kind is dict or kind is list:
        if depth >= NESTING_DEPTH_MAX:
            raise LimitExceeded(f"nested deeper than {NESTING_DEPTH_MAX} levels")
        for member in value.values() if kind is dict else value:
            kind = type(member)
            if kind is dict or kind is list or (kind is int and member > INTEGER_MAX):
                _check_decoded(member, depth + 1)
    elif kind is int and value > INTEGER_MAX:
        raise InvalidValue("an integer over 64 bits with a sign")


def _map_without_duplicates(pairs: list[tuple[Any, Any]]) -> Attributes:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise InvalidValue("a map has the same key twice")
    try:
        "".join(result)  # the quickest way to learn that every key is a string
    except TypeError:
        raise InvalidValue("a map key is no string") from None
    return result


def _decode_extension(code: int, data: bytes) -> Any:
    if code == DECIMAL_EXTENSION:
        if len(data) > DECIMAL_BYTES_MAX:
            raise InvalidValue(f"a decimal is longer than {DECIMAL_BYTES_MAX} bytes")
        if not _DECIMAL.fullmatch(data):
            raise InvalidValue(f"not a decimal: {data!r}")
        try:
            return Decimal(data.decode("ascii"))
        except decimal.InvalidOperation:
            raise InvalidValue(f"a decimal out of range: {data!r}") from None
    raise InvalidValue(f"unknown MessagePack extension type {code}")


def _encode_extension(value: Any) -> Any:
    if type(value) is Decimal:
        return msgpack.ExtType(DECIMAL_EXTENSION, str(value).encode())
    raise TypeError(f"{type(value).__name__} is no value type")


class _Packer:
    """msgpack.packb makes a Packer a call, a third of its cost; one per thread is enough."""

    def __init__(self) -> None:
        self._local = threading.local()

    def pack(self, value: Any) -> bytes:
        try:
            packer = self._local.packer
        except AttributeError:
            packer = self.reset()
        return packer.pack(value)  # type: ignore[no-any-return]

    def reset(self) -> Any:
        packer = self._local.packer = msgpack.Packer(default=_encode_extension, strict_types=True, datetime=True)
        return packer


_PACKER: Final = _Packer()
