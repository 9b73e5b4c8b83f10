/**
 * A client of tidelog.v1: work offline, synchronize when there is a network.
 *
 *   const client = new Client({ state: 'state.json', server: '127.0.0.1:50051' });
 *   const milk = client.create('Task', { title: 'Buy milk', done: false });
 *   const report = await client.synchronize();
 *
 * The rules it follows, and what each of them prevents, are in docs/protocol.md.
 */
import { setTimeout } from 'node:timers/promises';
import { credentials } from '@grpc/grpc-js';
import { Files, referenceOf, sendable } from './files.mjs';
import {
  FailureService,
  FileService,
  MESSAGE_BYTES_MAX,
  PROTOCOL_VERSION,
  SynchronizationError,
  SyncService,
  errorOf,
  unary,
} from './protocol.mjs';
import { State, StateLost, intents } from './state.mjs';

export { SynchronizationError } from './protocol.mjs';
export { intents } from './state.mjs';
export { Decimal, InvalidValue, Timestamp, decode, toJson } from './values.mjs';

const BACKOFF_MS_FIRST = 100;
const BACKOFF_MS_MAX = 5_000;
const TIMEOUT_MS_DEFAULT = 30_000;

const OPTIONS = {
  'grpc.max_receive_message_length': MESSAGE_BYTES_MAX,
  // Pings find a server that vanished without a word.
  'grpc.keepalive_time_ms': 30_000,
  'grpc.keepalive_timeout_ms': 10_000,
};

const FINAL = new Set(['OPERATION_STATUS_APPLIED', 'OPERATION_STATUS_REJECTED']);

export class Client {
  #state;
  #sync;
  #failures;
  #contents;
  #files;
  #synchronizing = false;

  constructor({ state, server }) {
    this.#state = new State(state);
    if (server !== undefined) {
      this.#sync = new SyncService(server, credentials.createInsecure(), OPTIONS);
      this.#failures = new FailureService(server, credentials.createInsecure(), OPTIONS);
      this.#contents = new FileService(server, credentials.createInsecure(), OPTIONS);
    }
    this.#files = new Files(`${state}.files`, this.#contents);
  }

  get replicaId() {
    return this.#state.replicaId;
  }

  close() {
    this.#sync?.close();
    this.#failures?.close();
    this.#contents?.close();
  }

  // --- working, online or not --------------------------------------------------

  /** Create an object and return its id. On disk when this returns, as with every change. */
  create(entity, attributes, id) {
    const [operation] = this.#state.commit([intents.create(entity, attributes, id)]);
    return operation.id;
  }

  /** Change an object: { set, unset, increment, add, remove }, each of them optional. */
  update(entity, id, patch) {
    this.#state.commit([intents.update(entity, id, patch)]);
  }

  delete(entity, id) {
    this.#state.commit([intents.delete(entity, id)]);
  }

  /** Put a file into an attribute of an object: its content is on disk first, as the change is. */
  async attach(entity, id, attribute, path, { name, mediaType } = {}) {
    const reference = await this.#files.add(path, { name, mediaType });
    this.update(entity, id, { set: { [attribute]: reference } });
    return reference;
  }

  /** The path of a copy of the file in an attribute of an object; fetched from the server if it is not here. */
  async fetchFile(entity, id, attribute, { timeoutMs = TIMEOUT_MS_DEFAULT } = {}) {
    const reference = referenceOf(this.get(entity, id), attribute);
    return this.#retried(Date.now() + timeoutMs, (deadline) => this.#files.fetch(reference, { entity, id }, deadline));
  }

  /** Commit several `intents` at once; with `atomic` the server too applies all of them or none. */
  commit(members, { atomic = false } = {}) {
    return this.#state.commit(members, { atomic }).map((operation) => operation.id);
  }

  /** The attributes of an object, or null. */
  get(entity, id) {
    return this.#state.view(entity, id);
  }

  objects() {
    return this.#state.objects();
  }

  /** The operations that the server has not settled. */
  pending() {
    return this.#state.pending();
  }

  // --- synchronizing -------------------------------------------------------------

  /**
   * Upload what is pending, then download what changed, and say what was done.
   *
   * `mode` is ALL, or UNSYNCHRONIZED to download only what the upload changed. Whatever
   * breaks off is tried again until the time is over, from the start: it cannot do harm.
   * Contents have half of the time; operations whose contents need more are `notReady`.
   */
  async synchronize({ mode = 'ALL', timeoutMs = TIMEOUT_MS_DEFAULT } = {}) {
    if (this.#synchronizing) {
      throw new SynchronizationError(
        'Performing simultaneous synchronizations is not supported. ' +
          'Please try again after the current synchronization is completed.',
      );
    }
    if (!this.#sync) throw new SynchronizationError('the client was opened without a server');
    this.#synchronizing = true;
    const report = { results: [], notReady: [], downloaded: [], confirmed: [], removed: [], held: 0, attempts: 0 };
    try {
      await this.#retried(Date.now() + timeoutMs, async (deadline) => {
        report.attempts += 1;
        const contents = await this.#files.upload(this.#state.pending(), (Date.now() + deadline) / 2);
        await new Session(this.#state, this.#sync, mode, report, contents).run(deadline);
      });
      return report;
    } finally {
      this.#synchronizing = false;
    }
  }

  /** Do what may break off again until it does not, or the time is over. */
  async #retried(deadline, attempt) {
    for (let backoff = BACKOFF_MS_FIRST; ; backoff = Math.min(backoff * 2, BACKOFF_MS_MAX)) {
      try {
        return await attempt(deadline);
      } catch (error) {
        const pause = backoff * (0.5 + Math.random() / 2);
        if (error instanceof StateLost) this.#state.loseState();
        else if (error.transient && Date.now() + pause < deadline) await setTimeout(pause);
        else throw error;
      }
    }
  }

  // --- single calls ----------------------------------------------------------------

  /**
   * Send operations, as bytes, in one call without a stream, and return their results.
   *
   * Safe to repeat: an operation that is settled gets its former result again.
   */
  async uploadOperations(operationsOf) {
    const { replicaId } = this.#state;
    const request = { protocolVersion: PROTOCOL_VERSION, replicaId, operationsOf };
    return (await unary(this.#sync, 'UploadOperations', request, Date.now() + TIMEOUT_MS_DEFAULT)).results;
  }

  /** The server's record of a refusal. */
  async failure(id) {
    return (await unary(this.#failures, 'GetFailure', { id }, Date.now() + TIMEOUT_MS_DEFAULT)).failure;
  }
}

/** One attempt at a synchronization. */
class Session {
  #state;
  #service;
  #mode;
  #report;
  #call;
  #stage = 'opening';
  #batches;
  #limits;
  #inFlight = []; // the operations of each batch that is not answered yet
  #held = new Map(); // seq -> operation
  #reconcile = false;
  #pages = [];
  #contents;

  constructor(state, service, mode, report, contents) {
    this.#contents = contents;
    this.#state = state;
    this.#service = service;
    this.#mode = mode;
    this.#report = report;
  }

  async run(deadline) {
    // What is committed from now on belongs to the next session.
    const pending = this.#state.pending();
    const operations = sendable(pending, this.#contents.waiting);
    const left = pending.filter((one) => !operations.includes(one));
    this.#call = this.#service.Synchronize({ deadline });
    this.#call.on('error', () => {}); // the loop below throws it
    try {
      this.#call.write({
        start: {
          protocolVersion: PROTOCOL_VERSION,
          replicaId: this.#state.replicaId,
          mode: `SYNCHRONIZE_MODE_${this.#mode}`,
          cursor: this.#state.cursor,
          uploading: operations.length > 0,
          leavesEarlierOperations: left.length > 0 && left[0].seq < (operations.at(-1)?.seq ?? 0n),
          acceptsConfirmations: !this.#state.stateLost,
        },
      });
      if (!operations.length) this.#endUpload(); // nothing to wait for: saves a round trip
      for await (const response of this.#call) this.#receive(response, operations);
    } catch (error) {
      throw errorOf(error);
    } finally {
      this.#call.cancel();
    }
    if (this.#stage !== 'done') throw new SynchronizationError('the server broke off', { transient: true });
    const message = 'the content of a file is not at the server yet';
    this.#report.notReady.push(...left.map((operation) => ({ operation, message })));
  }

  #receive({ message, ...response }, operations) {
    const expected = {
      opening: ['started'],
      uploading: ['batchResults'],
      settling: ['uploadSettled'],
      downloading: ['page', 'complete'],
    }[this.#stage];
    if (!expected?.includes(message)) throw violated(`sent ${message} while ${this.#stage}`);
    if (message === 'started') this.#started(response.started, operations);
    if (message === 'batchResults') this.#batchResults(response.batchResults);
    if (message === 'uploadSettled') this.#uploadSettled(response.uploadSettled);
    if (message === 'page') this.#page(response.page);
    if (message === 'complete') this.#complete(response.complete);
  }

  // --- upload ----------------------------------------------------------------

  #started(started, operations) {
    const state = this.#state;
    if (started.protocolVersion !== PROTOCOL_VERSION) {
      throw new SynchronizationError(`the server speaks version ${started.protocolVersion} of the protocol`);
    }
    if (state.epoch && state.epoch !== started.epoch) {
      throw new SynchronizationError(`this replica belongs to the store ${state.epoch}, not to ${started.epoch}`);
    }
    if (started.settled && state.isForkedFrom(started.settled)) {
      throw new SynchronizationError('the server knows other operations of this replica: the file is an older copy');
    }
    state.adopt(started.epoch);
    this.#reconcile = started.reconcile;
    this.#limits = started.limits;
    this.#batches = batchesOf(operations, started.limits);
    this.#stage = operations.length ? 'uploading' : 'settling';
    if (operations.length) this.#sendBatches();
  }

  /** Keep as many batches under way as the server takes. */
  #sendBatches() {
    while (this.#inFlight.length < Math.max(1, this.#limits.batchesInFlight)) {
      const { value: batch, done } = this.#batches.next();
      if (done) {
        if (!this.#inFlight.length) this.#endUpload();
        return;
      }
      this.#inFlight.push(batch);
      const lostContents = [...this.#contents.lost].map((name) => Buffer.from(name, 'hex'));
      this.#call.write({ batchOf: batch.map((operation) => operation.data), lostContents });
    }
  }

  #endUpload() {
    if (this.#stage === 'uploading') this.#stage = 'settling';
    this.#call.write({ uploadComplete: {} });
    this.#call.end();
  }

  #batchResults({ results }) {
    const batch = this.#inFlight.shift();
    if (results.length !== batch?.length || results.some((result, at) => BigInt(result.seq) !== batch[at].seq)) {
      throw violated('sent results that are not those of the batch');
    }
    this.#settle(results, batch, { mayHold: true });
    this.#sendBatches();
  }

  #uploadSettled({ results, moreFollow }) {
    const operations = results.map((result) => this.#held.get(BigInt(result.seq)));
    if (operations.includes(undefined)) throw violated('settled what was not held');
    this.#settle(results, operations, { mayHold: false });
    if (moreFollow) return;
    if (this.#held.size) throw violated('ended the upload with operations held');
    this.#stage = 'downloading';
  }

  #settle(results, operations, { mayHold }) {
    const final = [];
    results.forEach((result, at) => {
      const operation = operations[at];
      this.#held.delete(operation.seq);
      if (result.status === 'OPERATION_STATUS_HELD' && mayHold) {
        this.#held.set(operation.seq, operation);
        this.#report.held += 1;
      } else if (result.status === 'OPERATION_STATUS_NOT_READY') this.#report.notReady.push({ ...result, operation });
      else if (FINAL.has(result.status)) final.push({ ...result, operation });
      else throw violated(`gave seq ${result.seq} the status ${result.status}`);
    });
    this.#state.settle(final);
    this.#report.results.push(...final);
  }

  // --- download --------------------------------------------------------------

  #page(page) {
    this.#pages.push(page);
  }

  #complete({ cursor, version }) {
    if (this.#mode === 'ALL') {
      if (!cursor.length) throw violated('completed the download without a cursor');
      // Nothing of the download shows before all of it is here; then it and the cursor go together.
      const end = { reconcile: this.#reconcile, cursor, version: BigInt(version) };
      this.#take(this.#pages, () => this.#state.publish(this.#pages, end));
    } else this.#take(this.#pages, () => this.#state.merge(this.#pages));
    this.#stage = 'done';
  }

  #take(pages, change) {
    change();
    for (const { snapshots, confirmations, removals } of pages) {
      this.#report.downloaded.push(...snapshots);
      this.#report.confirmed.push(...confirmations);
      this.#report.removed.push(...removals);
    }
  }
}

/** Operations as batches within the server's limits; a commit group is never in two. */
function* batchesOf(operations, { batchOperationCount, batchBytes }) {
  let batch = [];
  let bytes = 0;
  for (let at = 0; at < operations.length; ) {
    const unit = operations.slice(at, at + (operations[at].group?.size ?? 1));
    const unitBytes = unit.reduce((sum, one) => sum + one.data.length, 0);
    if (batch.length && (batch.length + unit.length > batchOperationCount || bytes + unitBytes > batchBytes)) {
      yield batch;
      batch = [];
      bytes = 0;
    }
    batch.push(...unit);
    bytes += unitBytes;
    at += unit.length;
  }
  if (batch.length) yield batch;
}

function violated(what) {
  return new SynchronizationError(`the server ${what}: that is not the protocol`);
}
