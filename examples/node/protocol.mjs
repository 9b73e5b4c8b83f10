/**
 * The protocol's messages, loaded from the same files that every other client uses.
 *
 * Operations stay the bytes they were written as: a batch is put together from them
 * without decoding, so a repetition is the same to the last bit.
 */
import { fileURLToPath } from 'node:url';
import { loadPackageDefinition, status } from '@grpc/grpc-js';
import { fromJSON, loadSync } from '@grpc/proto-loader';

export const PROTOCOL_VERSION = 1;
export const MESSAGE_BYTES_MAX = 4 * 1024 * 1024;

const PROTO_FOLDER = fileURLToPath(new URL('../../proto', import.meta.url));
const FILES = ['sync', 'failure', 'object', 'file'].map((name) => `tidelog/v1/${name}.proto`);

const definitions = loadSync(FILES, {
  includeDirs: [PROTO_FOLDER],
  defaults: true,
  enums: String,
  longs: String,
  oneofs: true,
});

/** Adds to each request what is spliced into it. */
function splice(method, parts) {
  const serialize = method.requestSerialize;
  method.requestSerialize = (request) => Buffer.concat([serialize(request), ...parts(request)]);
}

const sync = definitions['tidelog.v1.SyncService'];
splice(sync.Synchronize, ({ batchOf, lostContents = [] }) =>
  batchOf
    ? [field(2, Buffer.concat([...batchOf.map((one) => field(1, one)), ...lostContents.map((one) => field(3, one))]))]
    : [],
);
splice(sync.UploadOperations, ({ operationsOf }) => operationsOf.map((one) => field(3, one)));

export const { SyncService, FailureService, ObjectService, FileService } = loadPackageDefinition(definitions).tidelog.v1;

export const encodeOperation = definitions['tidelog.v1.Operation'].serialize;
export const decodeOperation = definitions['tidelog.v1.Operation'].deserialize;

/** A length-delimited field of a message: tag, length, bytes. */
function field(number, bytes) {
  const head = [(number << 3) | 2];
  let length = bytes.length;
  for (; length > 0x7f; length >>>= 7) head.push((length & 0x7f) | 0x80);
  head.push(length);
  return Buffer.concat([Buffer.from(head), bytes]);
}

const string = (id) => ({ type: 'string', id });
const rpcStatus = fromJSON({
  nested: {
    Any: { fields: { typeUrl: string(1), value: { type: 'bytes', id: 2 } } },
    Status: { fields: { details: { rule: 'repeated', type: 'Any', id: 3 } } },
    ErrorInfo: { fields: { reason: string(1), domain: string(2) } },
  },
});

/** What a synchronization fails with. `reason` is for programs, the message for people. */
export class SynchronizationError extends Error {
  name = 'SynchronizationError';

  constructor(message, { reason = '', transient = false, cause } = {}) {
    super(message, { cause });
    this.reason = reason;
    this.transient = transient;
  }
}

const TRANSIENT = new Set([
  status.UNAVAILABLE,
  status.ABORTED,
  status.RESOURCE_EXHAUSTED,
  status.DEADLINE_EXCEEDED,
  status.CANCELLED,
]);

/** A failed call as a SynchronizationError with the server's reason, if it gave one. */
export function errorOf(error) {
  if (error instanceof SynchronizationError || error.code === undefined) return error;
  let reason = '';
  for (const bytes of error.metadata?.get('grpc-status-details-bin') ?? []) {
    for (const detail of rpcStatus.Status.deserialize(bytes).details ?? []) {
      if (detail.typeUrl.endsWith('/google.rpc.ErrorInfo')) {
        reason = rpcStatus.ErrorInfo.deserialize(detail.value).reason;
      }
    }
  }
  return new SynchronizationError(`${error.details}${reason && ` (${reason})`}`, {
    reason,
    transient: TRANSIENT.has(error.code),
    cause: error,
  });
}

/** One call without a stream. */
export function unary(service, method, request, deadline) {
  return new Promise((resolve, reject) => {
    service[method](request, { deadline }, (error, response) => (error ? reject(errorOf(error)) : resolve(response)));
  });
}
