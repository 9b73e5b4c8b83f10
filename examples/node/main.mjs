/**
 * A replica in another language: works, synchronizes, and prints what happened as JSON lines.
 *
 *   node main.mjs --server 127.0.0.1:50051
 *   node main.mjs --state field.json edit                          offline: no server needed
 *   node main.mjs --state field.json --server 127.0.0.1:50051 sync
 *
 * Steps, in the order given; all of them as below if none is given:
 *
 *   sync       upload what is pending, download what changed
 *   edit       create objects, one without a title; update one and delete one
 *   sync
 *   repeat     send once more what was sent last: the answers are the same
 *   failures   ask the server for its records of what it refused
 *   objects    print every object
 *
 * Not among them unless named:
 *
 *   bulk       create --count tasks, then an order with its lines before itself, as one commit group
 *   attach     put the file --file into the attribute `photo` of the task --update
 *   fetch      get the file in the attribute `photo` of the task --update
 *
 * --update ID and --delete ID name the tasks to be updated and deleted; otherwise the
 * step `edit` makes its own. --mode UNSYNCHRONIZED downloads only what the upload changed.
 */
import { mkdtempSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { Client, Decimal, SynchronizationError, Timestamp, decode, intents, toJson } from './tidelog.mjs';

const STEPS_DEFAULT = ['sync', 'edit', 'sync', 'repeat', 'failures', 'objects'];

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    server: { type: 'string' },
    state: { type: 'string' },
    mode: { type: 'string', default: 'ALL' },
    update: { type: 'string' },
    delete: { type: 'string' },
    count: { type: 'string', default: '2500' },
    file: { type: 'string' },
  },
});

const state = options.state ?? join(mkdtempSync(join(tmpdir(), 'tidelog-')), 'state.json');
const client = new Client({ state, server: options.server });
let newest = []; // what the newest synchronization settled

function print(event, facts) {
  console.log(toJson({ event, ...facts }));
}

const plainKind = (operation) => operation.kind.replace('OPERATION_KIND_', '').toLowerCase();
const keyOf = ({ entity, id }) => ({ entity, id });

const steps = {
  async sync() {
    const report = await client.synchronize({ mode: options.mode });
    for (const { operation, seq, version, failureId, reason, message, status } of report.results) {
      const facts = { seq: BigInt(seq), kind: plainKind(operation), ...keyOf(operation) };
      if (status === 'OPERATION_STATUS_APPLIED') print('applied', { ...facts, version: BigInt(version) });
      else print('rejected', { ...facts, failure_id: failureId, reason, message });
    }
    for (const { operation, message } of report.notReady) print('not_ready', { ...keyOf(operation), message });
    for (const { version, attributes, ...key } of report.downloaded) {
      print('downloaded', { ...keyOf(key), version: BigInt(version), attributes: decode(attributes) });
    }
    for (const { version, ...key } of report.confirmed) print('confirmed', { ...keyOf(key), version: BigInt(version) });
    for (const { version, ...key } of report.removed) print('removed', { ...keyOf(key), version: BigInt(version) });
    const counts = { attempts: report.attempts, held: report.held, pending: client.pending().length };
    print('synchronized', Object.fromEntries(Object.entries(counts).map(([name, count]) => [name, BigInt(count)])));
    newest = report.results;
  },

  edit() {
    client.create('Task', { title: 'Written in Node', done: false });
    client.create('Task', { title: '', done: false }); // the server wants a title
    const updated = options.update ?? client.create('Task', { title: 'To be changed', done: false });
    client.update('Task', updated, { set: { done: true }, increment: { changes: 1n } });
    client.delete('Task', options.delete ?? client.create('Task', { title: 'To be deleted', done: false }));
    client.create('Sample', {
      null: null,
      bool: true,
      integer: 2n ** 63n - 1n,
      negative: -(2n ** 63n),
      small: 1n,
      float: 1,
      fraction: 0.1,
      string: 'grüß dich, 世界 🌊',
      binary: Uint8Array.from([0, 1, 0xfe, 0xff]),
      timestamp: new Timestamp(1_700_000_000_123_456n),
      old: new Timestamp(-1n),
      decimal: new Decimal('12.50'),
      list: [1n, 1, '1', [null, new Decimal('-0.001')]],
      map: { deep: { er: [false, Timestamp.now()] } },
    });
    for (const operation of client.pending()) {
      const { seq, nonce } = operation;
      print('committed', { seq, nonce: BigInt(nonce), kind: plainKind(operation), ...keyOf(operation) });
    }
  },

  bulk() {
    const tasks = Array.from({ length: Number(options.count) }, (_, number) =>
      intents.create('Task', { title: `Task ${number}`, done: false }),
    );
    client.commit(tasks);
    const order = intents.create('Order', { placed: Timestamp.now() });
    const lines = ['Milk', 'Bread'].map((article) => intents.create('OrderLine', { order: order.id, article }));
    client.commit([...lines, order], { atomic: true });
  },

  async attach() {
    const { name, size, sha256 } = await client.attach('Task', options.update, 'photo', options.file);
    print('attached', { id: options.update, name, size, sha256 });
  },

  async fetch() {
    print('fetched', { id: options.update, path: await client.fetchFile('Task', options.update, 'photo') });
  },

  async repeat() {
    const results = await client.uploadOperations(newest.map(({ operation }) => operation.data));
    results.forEach((result, at) => {
      const { operation, ...former } = newest[at];
      const same = Object.keys(former).every((name) => former[name] === result[name]);
      print('repeated', { seq: BigInt(result.seq), status: result.status, same });
    });
  },

  async failures() {
    for (const { failureId } of newest.filter((result) => result.failureId)) {
      const failure = await client.failure(failureId);
      const { id, entity, objectId, reason, message, replicaId, operationJson } = failure;
      const facts = { id, entity, object_id: objectId, reason, message, replica_id: replicaId };
      print('failure', { ...facts, operation_json: operationJson });
    }
  },

  objects() {
    for (const object of client.objects()) print('object', object);
  },
};

const wanted = positionals.length ? positionals : STEPS_DEFAULT;
const unknown = wanted.find((step) => !Object.hasOwn(steps, step));
if (unknown !== undefined) {
  console.error(`there is no step ${unknown}: use ${Object.keys(steps).join(', ')}`);
  process.exit(2);
}
try {
  print('opened', { state, replica_id: client.replicaId });
  for (const step of wanted) await steps[step]();
} catch (error) {
  if (!(error instanceof SynchronizationError)) throw error;
  print('failed', { reason: error.reason, message: error.message });
  process.exitCode = 1;
} finally {
  client.close();
}
