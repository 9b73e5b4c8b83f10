/**
 * State: what a client must still know after a crash, in one JSON file.
 *
 *   replicaId, epoch   who this is, and which store it belongs to
 *   lastSeq            position of the newest operation ever made
 *   newest             seq and nonce of the newest settled operation
 *   operations         those that are pending, or applied above their object's base
 *   objects            the base: each object as the server last told it
 *   cursor             what the base stands for, and the version of that
 *   ahead              objects that came without the cursor and are newer
 *   failures           the operations that were refused, each with its bytes
 *
 * The view of an object is its base with every operation replayed that is pending, or
 * applied at a version above the base's.
 *
 * A change is one atomic replacement of the whole file, synced to disk. That keeps the
 * example short and its promises whole; a real replica does the same with a database.
 */
import { randomBytes, randomFillSync, randomUUID } from 'node:crypto';
import { closeSync, existsSync, fsyncSync, openSync, readFileSync, renameSync, writeSync } from 'node:fs';
import { dirname } from 'node:path';
import { decodeOperation, encodeOperation } from './protocol.mjs';
import * as values from './values.mjs';

const FORMAT = 'tidelog-example-1';
const OPERATION_BYTES_MAX = 1024 * 1024;
const GROUP_OPERATIONS_MAX = 1_000;
const GROUP_BYTES_MAX = 2 * 1024 * 1024;

const CREATE = 'OPERATION_KIND_CREATE';
const UPDATE = 'OPERATION_KIND_UPDATE';
const DELETE = 'OPERATION_KIND_DELETE';

/** The server confirmed a state that is not here: all states must be sent again. */
export class StateLost extends Error {}

export class State {
  #path;
  #operations; // seq -> operation
  #objects; // entity NUL id -> { entity, id, version, attributes }
  #ahead; // entity NUL id

  constructor(path) {
    this.#path = path;
    this.#load();
    this.#save();
  }

  // --- reading ---------------------------------------------------------------

  /** An object as its user sees it, or null. */
  view(entity, id) {
    const base = this.#objects.get(keyOf({ entity, id }));
    return this.#replayed(base, () => true, { entity, id });
  }

  /** Every object that there is to see, as { entity, id, version, attributes }. */
  *objects() {
    const keys = new Map([...this.#objects.values(), ...this.#operations.values()].map((one) => [keyOf(one), one]));
    for (const { entity, id } of keys.values()) {
      const attributes = this.view(entity, id);
      const version = this.#objects.get(keyOf({ entity, id }))?.version ?? 0n;
      if (attributes !== null) yield { entity, id, version, attributes };
    }
  }

  /** The operations up to a position that the server has not settled, in log order. */
  pending(until = this.lastSeq) {
    return [...this.#operations.values()].filter((one) => one.version === 0n && one.seq <= until);
  }

  /** Whether the server has settled an operation at one of our positions that we did not make. */
  isForkedFrom({ newestSeq, newestNonce }) {
    const seq = BigInt(newestSeq);
    if (seq > this.lastSeq) return true;
    const mine = this.newest.seq === seq ? this.newest : this.#operations.get(seq);
    return mine !== undefined && seq !== 0n && mine.nonce !== newestNonce;
  }

  // --- changing --------------------------------------------------------------

  /**
   * Record what is to be done: [{ kind, entity, id, patch }]. On disk when this returns.
   *
   * With `atomic` the server applies all of them or none.
   */
  commit(intents, { atomic = false } = {}) {
    const views = new Map();
    const made = intents.map(({ kind, entity, id, patch }, position) => {
      const key = keyOf({ entity, id });
      const now = views.has(key) ? views.get(key) : this.view(entity, id);
      if ((kind === CREATE) !== (now === null)) {
        throw new values.InvalidValue(`${entity} ${id} ${now === null ? 'does not exist' : 'exists already'}`);
      }
      const operation = {
        seq: this.lastSeq + 1n + BigInt(position),
        nonce: `${randomBytes(8).readBigUInt64LE()}`,
        kind,
        entity,
        id,
        patch: kind === DELETE ? Buffer.alloc(0) : values.encode(patch),
        version: 0n,
      };
      const group = atomic && intents.length > 1 && { id: `${this.lastSeq + 1n}`, position, size: intents.length };
      const milliseconds = Date.now();
      operation.group = group || null;
      operation.data = encodeOperation({
        ...operation,
        seq: `${operation.seq}`,
        baseVersion: `${this.#objects.get(key)?.version ?? 0n}`,
        clientTime: { seconds: Math.floor(milliseconds / 1000), nanos: (milliseconds % 1000) * 1e6 },
      });
      if (operation.data.length > OPERATION_BYTES_MAX) throw new values.InvalidValue('an operation over 1 MiB');
      views.set(key, replay(now, operation));
      return operation;
    });
    const bytes = made.reduce((sum, one) => sum + one.data.length, 0);
    if (atomic && (made.length > GROUP_OPERATIONS_MAX || bytes > GROUP_BYTES_MAX)) {
      throw new values.InvalidValue('a commit group of over 1,000 operations or 2 MiB');
    }
    return this.#change(() => {
      for (const one of made) this.#operations.set(one.seq, one);
      this.lastSeq += BigInt(made.length);
      return made;
    });
  }

  /** Belong to a store from now on. */
  adopt(epoch) {
    if (this.epoch !== epoch) this.#change(() => (this.epoch = epoch));
  }

  /** Take in final results: applied, or refused. What is settled already is passed over. */
  settle(results) {
    if (results.length) this.#change(() => results.forEach((result) => this.#settle(result)));
  }

  /** Take in a page that says nothing of the objects not in it. */
  merge(pages) {
    this.#change(() => {
      for (const page of pages) {
        this.#apply(page, { reconcile: false });
        // The server tells of a deletion only what was there at the cursor. The next download
        // brings these again; if it does not, they are gone.
        for (const one of [...page.snapshots, ...page.confirmations]) {
          if (BigInt(one.version) > this.cursorVersion) this.#ahead.add(keyOf(one));
        }
      }
    });
  }

  /** Take in a whole download, and the cursor with it. */
  publish(pages, { reconcile, cursor, version }) {
    this.#change(() => {
      pages.forEach((page) => this.#apply(page, { reconcile }));
      if (reconcile) {
        const told = new Set(pages.flatMap((page) => [...page.snapshots, ...page.confirmations]).map(keyOf));
        for (const key of this.#objects.keys()) if (!told.has(key)) this.#objects.delete(key);
      }
      for (const key of this.#ahead) this.#objects.delete(key);
      this.#ahead.clear();
      // An object that did not come although we changed it has left no trace: created and deleted in between.
      this.#forget((one) => one.version <= version);
      this.cursor = cursor;
      this.cursorVersion = version;
      this.stateLost = false;
    });
  }

  /** Have the next session send all states. */
  loseState() {
    this.#change(() => {
      this.cursor = Buffer.alloc(0);
      this.stateLost = true;
    });
  }

  // --- the view --------------------------------------------------------------

  #replayed(base, selects, { entity, id }) {
    let attributes = base ? values.decode(base.attributes) : null;
    for (const one of this.#operations.values()) {
      if (one.entity !== entity || one.id !== id || !selects(one)) continue;
      const isInBase = one.version !== 0n && one.version <= (base?.version ?? 0n);
      if (!isInBase) attributes = replay(attributes, one);
    }
    return attributes;
  }

  #settle(result) {
    const operation = this.#operations.get(BigInt(result.seq));
    if (operation === undefined || operation.version !== 0n) return;
    if (operation.seq >= this.newest.seq) this.newest = { seq: operation.seq, nonce: operation.nonce };
    if (result.status === 'OPERATION_STATUS_APPLIED') {
      operation.version = BigInt(result.version);
      const base = this.#objects.get(keyOf(operation));
      if (base && base.version >= operation.version) this.#operations.delete(operation.seq);
    } else {
      this.#operations.delete(operation.seq);
      const { failureId, reason, message } = result;
      this.failures.push({ id: failureId, reason, message, operation: operation.data.toString('base64') });
    }
  }

  #apply(page, { reconcile }) {
    for (const one of [...page.snapshots, ...page.confirmations, ...page.removals]) this.#ahead.delete(keyOf(one));
    for (const { entity, id, version, attributes } of page.snapshots) {
      this.#replace({ entity, id, version: BigInt(version), attributes }, { reconcile });
    }
    for (const { entity, id, version } of page.confirmations) {
      this.#confirm({ entity, id }, BigInt(version));
    }
    for (const removal of page.removals) {
      this.#objects.delete(keyOf(removal));
      this.#forget((one) => keyOf(one) === keyOf(removal) && one.version <= BigInt(removal.version));
    }
  }

  #replace(object, { reconcile }) {
    const key = keyOf(object);
    const base = this.#objects.get(key);
    // In a reconciliation the versions may be those of another history: what comes counts.
    if (base && base.version > object.version && !reconcile) return;
    this.#objects.set(key, object);
    this.#forget((one) => keyOf(one) === key && one.version <= object.version);
  }

  #confirm(key, version) {
    const base = this.#objects.get(keyOf(key));
    const covers = (one) => one.version !== 0n && one.version <= version;
    const attributes = this.#replayed(base, covers, key);
    const newest = [...this.#operations.values()].filter((one) => keyOf(one) === keyOf(key) && covers(one)).at(-1);
    if (attributes === null || (newest?.version ?? base?.version) < version) throw new StateLost();
    this.#objects.set(keyOf(key), { ...key, version, attributes: values.encode(attributes) });
    this.#forget((one) => keyOf(one) === keyOf(key) && covers(one));
  }

  /** Stop replaying the applied operations that a state contains. */
  #forget(contains) {
    for (const one of this.#operations.values()) {
      if (one.version !== 0n && contains(one)) this.#operations.delete(one.seq);
    }
  }

  // --- the file --------------------------------------------------------------

  #load() {
    const stored = existsSync(this.#path)
      ? JSON.parse(readFileSync(this.#path, 'utf8'))
      : { format: FORMAT, replicaId: randomUUID() };
    if (stored.format !== FORMAT) throw new Error(`${this.#path} holds ${stored.format}, not ${FORMAT}`);
    this.replicaId = stored.replicaId;
    this.epoch = stored.epoch ?? '';
    this.lastSeq = BigInt(stored.lastSeq ?? 0);
    this.newest = { seq: BigInt(stored.newest?.seq ?? 0), nonce: stored.newest?.nonce ?? '0' };
    this.cursor = Buffer.from(stored.cursor ?? '', 'base64');
    this.cursorVersion = BigInt(stored.cursorVersion ?? 0);
    this.#ahead = new Set(stored.ahead);
    this.stateLost = stored.stateLost ?? false;
    this.failures = stored.failures ?? [];
    this.#operations = new Map();
    for (const { data, version } of stored.operations ?? []) {
      const operation = { ...decodeOperation(Buffer.from(data, 'base64')), data: Buffer.from(data, 'base64') };
      operation.seq = BigInt(operation.seq);
      operation.version = BigInt(version);
      this.#operations.set(operation.seq, operation);
    }
    this.#objects = new Map();
    for (const { entity, id, version, attributes } of stored.objects ?? []) {
      const object = { entity, id, version: BigInt(version), attributes: Buffer.from(attributes, 'base64') };
      this.#objects.set(keyOf(object), object);
    }
  }

  /** Run a change and save it. If either fails, things are as the file has them. */
  #change(work) {
    try {
      const result = work();
      this.#save();
      return result;
    } catch (error) {
      this.#load();
      throw error;
    }
  }

  #save() {
    const stored = {
      format: FORMAT,
      replicaId: this.replicaId,
      epoch: this.epoch,
      lastSeq: `${this.lastSeq}`,
      newest: { seq: `${this.newest.seq}`, nonce: this.newest.nonce },
      cursor: this.cursor.toString('base64'),
      cursorVersion: `${this.cursorVersion}`,
      ahead: [...this.#ahead],
      stateLost: this.stateLost,
      failures: this.failures,
      operations: [...this.#operations.values()].map(({ data, version }) => ({
        data: data.toString('base64'),
        version: `${version}`,
      })),
      objects: [...this.#objects.values()].map(({ entity, id, version, attributes }) => ({
        entity,
        id,
        version: `${version}`,
        attributes: attributes.toString('base64'),
      })),
    };
    const draft = `${this.#path}.new`;
    const file = openSync(draft, 'w');
    try {
      writeSync(file, JSON.stringify(stored));
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    renameSync(draft, this.#path);
    const folder = openSync(dirname(this.#path), 'r');
    try {
      fsyncSync(folder);
    } finally {
      closeSync(folder);
    }
  }
}

/** What an operation makes of an object; null: there is none. */
function replay(attributes, operation) {
  if (operation.kind === DELETE) return null;
  const patch = values.decode(operation.patch);
  if (operation.kind === CREATE) return patch.set ?? {};
  if (attributes === null) return null;
  try {
    return values.applyPatch(attributes, patch);
  } catch (error) {
    if (error instanceof values.InvalidValue) return attributes; // the server decides about it
    throw error;
  }
}

/** Intents for `State.commit`. They throw InvalidValue for what no server would take. */
export const intents = {
  create(entity, attributes, id = uuid7()) {
    return checked({ kind: CREATE, entity, id, patch: { set: attributes } });
  },

  update(entity, id, patch) {
    return checked({ kind: UPDATE, entity, id, patch });
  },

  delete(entity, id) {
    return checked({ kind: DELETE, entity, id, patch: {} });
  },
};

function checked(intent) {
  values.checkName(intent.entity);
  values.checkName(intent.id, values.ID_BYTES_MAX);
  const { unset = [], ...maps } = intent.patch;
  const written = [...unset, ...Object.values(maps).flatMap(Object.keys)];
  if (new Set(written).size !== written.length) throw new values.InvalidValue('an attribute stands twice in one patch');
  written.forEach((name) => values.checkName(name));
  for (const attributes of Object.values(maps)) Object.values(attributes).forEach((value) => values.check(value));
  return intent;
}

/** A new id: ids made later sort later, so that what is written together lies together. */
function uuid7() {
  const bytes = randomFillSync(Buffer.alloc(16));
  bytes.writeUIntBE(Date.now(), 0, 6);
  bytes[6] = (bytes[6] & 0x0f) | 0x70;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  return bytes.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}

function keyOf({ entity, id }) {
  return `${entity}\0${id}`;
}
