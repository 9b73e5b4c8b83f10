/**
 * Files: their contents in a folder beside the state, each under its SHA-256.
 *
 *   ab12...        a content that is whole
 *   ab12....part   what has come of one, to go on with
 *
 * A content is on disk before the operation that refers to it is made, and at the server
 * before that operation is sent. Only what the other side lacks travels, and what was cut
 * off goes on where it was.
 */
import { createHash, randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { constants, createReadStream, existsSync, mkdirSync, rmSync, statSync } from 'node:fs';
import { copyFile, open, rename } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { SynchronizationError, errorOf, unary } from './protocol.mjs';
import { InvalidValue, decode } from './values.mjs';

const CHUNK_BYTES = 256 * 1024;
const STAT_MAX = 1_000;
const SHA256_BYTES = 32;
const FIELDS = ['media_type', 'name', 'sha256', 'size'];

/** Whether a value is a file reference: a map of precisely these fields, of these types. */
export function isReference(value) {
  return (
    value !== null &&
    typeof value === 'object' &&
    Object.keys(value).sort().join() === FIELDS.join() &&
    typeof value.name === 'string' &&
    typeof value.media_type === 'string' &&
    typeof value.size === 'bigint' &&
    value.size >= 0n &&
    value.sha256 instanceof Uint8Array &&
    value.sha256.length === SHA256_BYTES
  );
}

export class Files {
  #folder;
  #service;

  constructor(folder, service) {
    this.#folder = folder;
    this.#service = service;
    mkdirSync(folder, { recursive: true });
  }

  /** Keep a copy of a file, and return the reference to it: the value of an attribute. */
  async add(path, { name = basename(path), mediaType = 'application/octet-stream' } = {}) {
    const part = join(this.#folder, `${randomUUID()}.part`);
    await copyFile(path, part, constants.COPYFILE_EXCL);
    const sha256 = await digest(part);
    const size = BigInt(statSync(part).size);
    await this.#adopt(part, sha256);
    return { name, size, media_type: mediaType, sha256 };
  }

  /** The path of a content that is here, or undefined. */
  find({ sha256 }) {
    const path = this.#path(sha256);
    return existsSync(path) ? path : undefined;
  }

  /**
   * Bring to the server what it lacks of the contents that operations refer to, the smallest first.
   *
   * Returns the hashes of those that are not there: `lost` are those that are not here either, `waiting` go on
   * another time. One that fails stops no other.
   */
  async upload(operations, deadline) {
    const contents = [...referencesOf(operations).values()].sort((a, b) => Number(a.size - b.size));
    const left = { lost: new Set(), waiting: new Set(contents.map(({ sha256 }) => hex(sha256))) };
    try {
      for (let at = 0; at < contents.length; at += STAT_MAX) {
        const asked = contents.slice(at, at + STAT_MAX);
        const request = { contents: asked.map(({ sha256, size }) => ({ sha256, size: `${size}` })) };
        const { statuses } = await unary(this.#service, 'StatFiles', request, deadline);
        for (const [place, { state, receivedBytes }] of statuses.entries()) {
          const name = hex(asked[place].sha256);
          const isMissing = state === 'FILE_STATE_MISSING';
          const isLost = isMissing && this.find(asked[place]) === undefined;
          if (isLost) left.lost.add(name);
          if (isLost || !isMissing || (await this.#isUploaded(asked[place], Number(receivedBytes), deadline))) {
            left.waiting.delete(name);
          }
        }
      }
    } catch (error) {
      if (!(error instanceof SynchronizationError)) throw error;
    }
    return left;
  }

  /** The path of the content that an attribute of an object refers to; fetched if it is not here. */
  async fetch(reference, object, deadline) {
    return this.find(reference) ?? (await this.#download(reference, object, deadline));
  }

  async #isUploaded(content, offset, deadline) {
    try {
      await this.#upload(content, offset, deadline);
      return true;
    } catch (error) {
      if (error instanceof SynchronizationError) return false;
      throw error;
    }
  }

  async #upload({ sha256, size }, offset, deadline) {
    const path = this.find({ sha256 });
    let call;
    const answer = new Promise((resolve, reject) => {
      call = this.#service.UploadFile({ deadline }, (error) => (error ? reject(errorOf(error)) : resolve()));
    });
    answer.catch(() => {}); // it is awaited below, maybe after the writing has failed
    call.on('error', () => {});
    call.write({ start: { content: { sha256, size: `${size}` }, offset: `${offset}` } });
    for await (const chunk of createReadStream(path, { start: offset, highWaterMark: CHUNK_BYTES })) {
      // A server that has ended the call takes nothing more.
      if (!call.write({ chunk })) await Promise.race([once(call, 'drain'), answer]);
    }
    call.end();
    await answer;
  }

  async #download({ sha256, size }, { entity, id }, deadline) {
    const part = `${this.#path(sha256)}.part`;
    const offset = existsSync(part) ? statSync(part).size : 0;
    const file = await open(part, 'a');
    const call = this.#service.DownloadFile({ sha256, object: { entity, id }, offset: `${offset}` }, { deadline });
    call.on('error', () => {}); // the loop below throws it
    try {
      for await (const { chunk } of call) await file.write(chunk);
    } catch (error) {
      throw errorOf(error);
    } finally {
      call.cancel();
      await file.close();
    }
    if (BigInt(statSync(part).size) !== size || hex(await digest(part)) !== hex(sha256)) {
      rmSync(part);
      throw new SynchronizationError(`what the server sent is not the content ${hex(sha256)}`);
    }
    return this.#adopt(part, sha256);
  }

  /** Make a file that is whole the content that it is. On disk when this returns. */
  async #adopt(part, sha256) {
    await synced(part);
    await rename(part, this.#path(sha256));
    await synced(this.#folder);
    return this.#path(sha256);
  }

  #path(sha256) {
    return join(this.#folder, hex(sha256));
  }
}

/** What of operations can be sent: not those whose contents wait, nor what comes later on their objects. */
export function sendable(operations, waiting) {
  const held = new Set();
  const sent = [];
  for (let at = 0; at < operations.length; ) {
    const unit = operations.slice(at, at + (operations[at].group?.size ?? 1));
    const keys = unit.map(({ entity, id }) => `${entity}\0${id}`);
    const waits = [...referencesOf(unit).keys()].some((name) => waiting.has(name));
    if (waits || keys.some((key) => held.has(key))) keys.forEach((key) => held.add(key));
    else sent.push(...unit);
    at += unit.length;
  }
  return sent;
}

/** The references to files that operations set, by hash. */
function referencesOf(operations) {
  const found = new Map();
  for (const { patch } of operations) {
    const { set = {} } = patch.length ? decode(patch) : {};
    for (const value of Object.values(set)) if (isReference(value)) found.set(hex(value.sha256), value);
  }
  return found;
}

/** The reference in an attribute of an object. */
export function referenceOf(attributes, attribute) {
  const value = attributes?.[attribute];
  if (!isReference(value)) throw new InvalidValue(`there is no file in the attribute ${attribute}`);
  return value;
}

async function digest(path) {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(path)) hash.update(chunk);
  return hash.digest();
}

async function synced(path) {
  const file = await open(path, 'r');
  await file.sync();
  await file.close();
}

function hex(sha256) {
  return Buffer.from(sha256).toString('hex');
}
