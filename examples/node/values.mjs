/**
 * Values: what an attribute can hold, its MessagePack form, and what patches do to it.
 *
 * The protocol has more types than JavaScript. Here each has one of its own, so that
 * nothing changes its type or loses a digit on its way through a program:
 *
 *   null, bool    null, boolean
 *   integer       bigint: 1n. All 64 bits are exact.
 *   float         number: 1 is the float 1.0
 *   string        string
 *   binary        Uint8Array (a Buffer is one)
 *   timestamp     Timestamp, in whole microseconds
 *   decimal       Decimal, as written: 12.50 stays 12.50
 *   list, map     array, plain object
 */
import {
  Decoder,
  Encoder,
  ExtensionCodec,
  decodeTimestampToTimeSpec,
  encodeTimeSpecToTimestamp,
} from '@msgpack/msgpack';

export const NESTING_DEPTH_MAX = 32;
export const NAME_BYTES_MAX = 64;
export const ID_BYTES_MAX = 128;

const TIMESTAMP_EXTENSION = -1;
const DECIMAL_EXTENSION = 1;
const DECIMAL_BYTES_MAX = 128;
const DECIMAL_FORM = /^([+-]?)(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?$/;
const SCALE_DIFFERENCE_MAX = 1_000;
const INTEGER_MIN = -(2n ** 63n);
const INTEGER_MAX = 2n ** 63n - 1n;
// The years 1 to 9999.
const MICROSECONDS_MIN = -62_135_596_800_000_000n;
const MICROSECONDS_MAX = 253_402_300_799_999_999n;

/** A value, a name or an id that the server would refuse. */
export class InvalidValue extends Error {
  name = 'InvalidValue';
}

/** A decimal number, kept as it was written. */
export class Decimal {
  constructor(text) {
    const parts = DECIMAL_FORM.exec(text);
    if (text.length > DECIMAL_BYTES_MAX || !parts || !(parts[2] || parts[3])) {
      throw new InvalidValue(`not a decimal: ${text}`);
    }
    this.text = text;
    const fraction = parts[3] ?? '';
    this.coefficient = BigInt(`${parts[2]}${fraction}`) * (parts[1] === '-' ? -1n : 1n);
    this.exponent = BigInt(parts[4] ?? 0) - BigInt(fraction.length);
  }

  static #of(coefficient, exponent) {
    const sign = coefficient < 0n ? '-' : '';
    const digits = `${coefficient < 0n ? -coefficient : coefficient}`;
    if (exponent > 0n) return new Decimal(`${sign}${digits}E+${exponent}`);
    const scale = Number(-exponent);
    const padded = digits.padStart(scale + 1, '0');
    const point = padded.length - scale;
    return new Decimal(sign + padded.slice(0, point) + (scale ? `.${padded.slice(point)}` : ''));
  }

  plus(other) {
    const exponent = this.exponent < other.exponent ? this.exponent : other.exponent;
    return Decimal.#of(this.#at(exponent) + other.#at(exponent), exponent);
  }

  /** The same number: 12.5 equals 12.50. */
  equals(other) {
    if (this.coefficient === 0n || other.coefficient === 0n) return this.coefficient === other.coefficient;
    const [mine, theirs] = [this.#shortest(), other.#shortest()];
    return mine[0] === theirs[0] && mine[1] === theirs[1];
  }

  toString() {
    return this.text;
  }

  #at(exponent) {
    const difference = this.exponent - exponent;
    if (difference > SCALE_DIFFERENCE_MAX) throw new InvalidValue(`${this.text} is too large to be added to`);
    return this.coefficient * 10n ** difference;
  }

  #shortest() {
    let [coefficient, exponent] = [this.coefficient, this.exponent];
    for (; coefficient % 10n === 0n; exponent += 1n) coefficient /= 10n;
    return [coefficient, exponent];
  }
}

/** A moment in UTC, in whole microseconds since 1970: a Date has milliseconds only. */
export class Timestamp {
  constructor(microseconds) {
    if (microseconds < MICROSECONDS_MIN || microseconds > MICROSECONDS_MAX) {
      throw new InvalidValue('a timestamp outside the years 1 to 9999');
    }
    this.microseconds = microseconds;
  }

  static fromDate(date) {
    return new Timestamp(BigInt(date.getTime()) * 1000n);
  }

  static now() {
    return Timestamp.fromDate(new Date());
  }

  get seconds() {
    return (this.microseconds - BigInt(this.nanoseconds / 1000)) / 1_000_000n;
  }

  get nanoseconds() {
    return Number(((this.microseconds % 1_000_000n) + 1_000_000n) % 1_000_000n) * 1000;
  }

  /** RFC 3339 with six digits of the second. */
  toString() {
    const seconds = new Date(Number(this.seconds) * 1000).toISOString().slice(0, 19);
    return `${seconds}.${String(this.nanoseconds / 1000).padStart(6, '0')}Z`;
  }
}

const extensionCodec = new ExtensionCodec();
extensionCodec.register({
  type: TIMESTAMP_EXTENSION,
  encode: (value) =>
    value instanceof Timestamp
      ? encodeTimeSpecToTimestamp({ sec: Number(value.seconds), nsec: value.nanoseconds })
      : null,
  decode: (data) => {
    const { sec, nsec } = decodeTimestampToTimeSpec(data);
    return new Timestamp(BigInt(sec) * 1_000_000n + BigInt(Math.floor(nsec / 1000)));
  },
});
extensionCodec.register({
  type: DECIMAL_EXTENSION,
  encode: (value) => (value instanceof Decimal ? Buffer.from(value.text, 'ascii') : null),
  decode: (data) => new Decimal(Buffer.from(data).toString('ascii')),
});

/** Marks what came as a float, because the library gives 1 and 1.0 as the same number. */
class Float {
  constructor(value) {
    this.value = value;
  }
}

class ExactDecoder extends Decoder {
  readF32() {
    return new Float(super.readF32());
  }

  readF64() {
    return new Float(super.readF64());
  }
}

const encoder = new Encoder({ extensionCodec, useBigInt64: true, forceIntegerToFloat: true });
const decoder = new ExactDecoder({ extensionCodec, useBigInt64: true });

/** The MessagePack form of a value that `check` accepts. */
export function encode(value) {
  return Buffer.from(encoder.encode(value));
}

/** The value that the bytes hold. */
export function decode(data) {
  return exact(decoder.decode(data));
}

function exact(value) {
  if (typeof value === 'number') return BigInt(value);
  if (value instanceof Float) return value.value;
  if (Array.isArray(value)) return value.map(exact);
  if (isMap(value)) return mapValues(value, exact);
  return value;
}

// The two methods above are no part of the library's interface: another version may have others.
if (typeof decode(encode(1)) !== 'number' || typeof decode(encode(1n)) !== 'bigint') {
  throw new Error('this @msgpack/msgpack does not tell floats from integers: use the one in package-lock.json');
}

/** Throw InvalidValue for an attribute that no server would take. The patch around it takes two levels. */
export function check(value, depth = 2) {
  if (value === null || typeof value === 'boolean' || typeof value === 'number') return;
  if (value instanceof Uint8Array || value instanceof Decimal || value instanceof Timestamp) return;
  if (typeof value === 'string') {
    if (!value.isWellFormed()) throw new InvalidValue('a string with a lone surrogate');
  } else if (typeof value === 'bigint') {
    if (value < INTEGER_MIN || value > INTEGER_MAX) throw new InvalidValue(`${value} is over 64 bits: use a Decimal`);
  } else if (Array.isArray(value) || isMap(value)) {
    if (depth >= NESTING_DEPTH_MAX) throw new InvalidValue(`nested deeper than ${NESTING_DEPTH_MAX} levels`);
    for (const [key, member] of Object.entries(value)) {
      if (key === '__proto__') throw new InvalidValue('JavaScript objects cannot hold the name __proto__');
      check(key, depth + 1);
      check(member, depth + 1);
    }
  } else {
    throw new InvalidValue(`${typeof value} is no type of value: see the top of values.mjs`);
  }
}

/** Throw InvalidValue for what cannot name an entity, an attribute or an object. */
export function checkName(text, bytesMax = NAME_BYTES_MAX) {
  const fits = typeof text === 'string' && text !== '' && text.isWellFormed() && !text.includes('\0');
  if (!fits || Buffer.byteLength(text) > bytesMax) {
    throw new InvalidValue(`a name or id is 1 to ${bytesMax} bytes without NUL, got ${JSON.stringify(text)}`);
  }
  if (text === '__proto__') throw new InvalidValue('JavaScript objects cannot hold the name __proto__');
}

/** Whether two values have the same type and are the same value. */
export function equal(left, right) {
  if (left instanceof Decimal) return right instanceof Decimal && left.equals(right);
  if (left instanceof Timestamp) return right instanceof Timestamp && left.microseconds === right.microseconds;
  if (left instanceof Uint8Array) return right instanceof Uint8Array && Buffer.compare(left, right) === 0;
  if (Array.isArray(left)) {
    return Array.isArray(right) && left.length === right.length && left.every((one, at) => equal(one, right[at]));
  }
  if (isMap(left)) {
    const names = Object.keys(left);
    return (
      isMap(right) &&
      names.length === Object.keys(right).length &&
      names.every((name) => Object.hasOwn(right, name) && equal(left[name], right[name]))
    );
  }
  return left === right || Object.is(left, right); // 0 equals -0, and NaN equals NaN
}

/** What a patch makes of attributes. Throws InvalidValue if an intent does not fit what is there. */
export function applyPatch(attributes, patch) {
  const result = { ...attributes, ...patch.set };
  for (const name of patch.unset ?? []) delete result[name];
  for (const [name, amount] of Object.entries(patch.increment ?? {})) {
    result[name] = incremented(result[name] ?? null, amount);
  }
  for (const [name, members] of Object.entries(patch.add ?? {})) {
    const present = [...membersOf(result[name])];
    for (const member of members) if (!present.some((one) => equal(one, member))) present.push(member);
    result[name] = present;
  }
  for (const [name, members] of Object.entries(patch.remove ?? {})) {
    result[name] = membersOf(result[name]).filter((one) => !members.some((member) => equal(one, member)));
  }
  return result;
}

/** Integers fit into numbers of any kind; nothing else is converted. */
function incremented(present, amount) {
  if (present === null) return amount;
  if (typeof present === 'bigint' && typeof amount === 'bigint') {
    check(present + amount);
    return present + amount;
  }
  if (typeof present === 'number' && typeof amount !== 'object') return present + Number(amount);
  if (present instanceof Decimal && typeof amount === 'bigint') return present.plus(new Decimal(`${amount}`));
  if (present instanceof Decimal && amount instanceof Decimal) return present.plus(amount);
  throw new InvalidValue('the increment does not fit what is there');
}

function membersOf(present) {
  if (present === null || present === undefined) return [];
  if (Array.isArray(present)) return present;
  throw new InvalidValue('what is there has no members');
}

/**
 * One value as JSON that loses nothing: integers with all digits, floats with a point
 * or an exponent, and what JSON has no form for as {"$timestamp": ...} and the like.
 */
export function toJson(value) {
  if (typeof value === 'bigint') return `${value}`;
  if (typeof value === 'number') {
    if (!Number.isFinite(value)) return `{"$float":"${value}"}`;
    const text = Object.is(value, -0) ? '-0' : `${value}`;
    return /[.e]/.test(text) ? text : `${text}.0`;
  }
  if (value instanceof Decimal) return `{"$decimal":"${value}"}`;
  if (value instanceof Timestamp) return `{"$timestamp":"${value}"}`;
  if (value instanceof Uint8Array) return `{"$bytes":"${Buffer.from(value).toString('base64')}"}`;
  if (Array.isArray(value)) return `[${value.map(toJson).join(',')}]`;
  if (isMap(value)) {
    const members = Object.entries(value).filter(([, member]) => member !== undefined);
    return `{${members.map(([name, member]) => `${JSON.stringify(name)}:${toJson(member)}`).join(',')}}`;
  }
  return JSON.stringify(value);
}

function isMap(value) {
  return typeof value === 'object' && value !== null && Object.getPrototypeOf(value) === Object.prototype;
}

function mapValues(map, change) {
  return Object.fromEntries(Object.entries(map).map(([name, member]) => [name, change(member)]));
}
