/** Calls of the API with the key of the user, which stays in the session storage of this tab. */

import { signal } from "./html.js";

const KEY_NAME = "stillhouse-key";
const CONNECTION_LOST = "The connection was lost before the end of the answer.";

/** The API key, or null before the sign-in. */
export const key = signal(sessionStorage.getItem(KEY_NAME));

/** Why the last sign-in ended, for the sign-in page. */
export const signOutReason = signal("");

/** Error with the message of the API. `status` is 0 if there was no response. */
export class ApiError extends Error {
  constructor(message, status, code = null, param = null) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

/** Throws an ApiError if the text cannot be a key. A header can hold ASCII characters only. */
export function validateKey(text) {
  if (/^[\x21-\x7e]+$/.test(text)) return;
  const message =
    "The key contains characters that no API key has, such as a blank or a letter with an accent. " +
    "Copy the key again.";
  throw new ApiError(message, 0, "invalid_api_key");
}

export function signIn(text) {
  sessionStorage.setItem(KEY_NAME, text);
  signOutReason.value = "";
  key.value = text;
}

export function signOut(reason = "") {
  sessionStorage.removeItem(KEY_NAME);
  signOutReason.value = reason;
  key.value = null;
}

/**
 * Sends a request and returns the response. Throws ApiError unless the status is 2xx. Signs out if
 * the service refuses the key of the session.
 * @param {string} path - path with query, from the root of the server
 * @param {object} options - method, json or body, headers, signal, and key instead of the present one
 * @returns {Promise<Response>}
 */
export async function request(path, options = {}) {
  const usedKey = options.key ?? key.value;
  const headers = { authorization: `Bearer ${usedKey}`, ...options.headers };
  let body = options.body;
  if (options.json !== undefined) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(options.json);
  }
  let response;
  try {
    const { method = "GET", signal: abort } = options;
    response = await fetch(path, { method, headers, body, signal: abort, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service cannot be reached. Check that it is running.", 0);
  }
  if (response.ok) return response;
  const error = await errorOf(response);
  // A late response to a request with an earlier key must not end the present session.
  const isSessionKey = options.key === undefined && usedKey === key.value;
  if (response.status === 401 && isSessionKey) signOut(error.message);
  throw error;
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, response.status, error.code, error.param);
  } catch {
    return new ApiError(`The service answered with status ${response.status}.`, response.status);
  }
}

/** Returns the parsed JSON of a response. Takes the options of `request`. */
export async function call(path, options) {
  return (await request(path, options)).json();
}

/** Returns a path with a query. Leaves out values that are null, undefined or empty. */
export function withQuery(path, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

/** Returns the path of a model's route. The id may contain a slash or an `@`. */
export function modelPath(id, rest = "") {
  return `/v1/models/${encodeURIComponent(id)}${rest}`;
}

/** Returns the path of an alias's route. Its id has the form `name@alias`. */
export function aliasPath(id, rest = "") {
  const [name, alias] = id.split("@");
  return `/v1/models/${encodeURIComponent(name)}/aliases/${encodeURIComponent(alias)}${rest}`;
}

/**
 * Yields the data of server-sent events, parsed as JSON, until `[DONE]`. Throws ApiError if the
 * stream ends before. EventSource is not used, because it cannot send the Authorization header.
 * @param {Response} response
 */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    while (true) {
      const { value, done } = await readFrom(reader);
      if (done) throw new ApiError(CONNECTION_LOST, 0);
      buffer += value.replaceAll("\r\n", "\n");
      const frames = buffer.split("\n\n");
      buffer = frames.pop();
      for (const frame of frames) {
        const data = dataOf(frame);
        if (data === "[DONE]") return;
        if (data !== "") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Reads the next piece. Throws ApiError if the connection is lost. */
async function readFrom(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(CONNECTION_LOST, 0);
  }
}

function dataOf(frame) {
  return frame
    .split("\n")
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
}

/**
 * Returns all objects of a list that has pages, up to `most`.
 * @param {string} path - path without a query
 * @param {object} query - parameters of the list, such as `purpose` or `after`
 */
export async function allPages(path, query = {}, most = 1000) {
  const objects = [];
  let { after = null } = query;
  do {
    const page = await call(withQuery(path, { limit: 100, ...query, after }));
    objects.push(...page.data);
    after = page.has_more ? page.last_id : null;
  } while (after !== null && objects.length < most);
  return objects;
}

/** Returns a random idempotency key, by which the service recognises retries of a request. */
export function idempotencyKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}
