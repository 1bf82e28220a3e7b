/**
 * Keeps a job, its metrics and its events up to date while it runs. The page of a job that has
 * ended or is paused sends no requests.
 */

import { useCallback, useEffect, useRef, useState } from "../html.js";
import { ApiError, call, eventsOf, request, withQuery } from "../api.js";
import { isVisible, usePolling } from "../live.js";
import { ENDED, seriesByName, withPoint } from "./jobs.js";
import { announce } from "./ui.js";

const POLL_SECONDS = 2;
const MIN_BACKOFF_SECONDS = 1;
const MAX_BACKOFF_SECONDS = 30;
const MAX_EVENTS = 500;

/** Adds the values of a metrics event to the series. Names of OpenAI that repeat ours are skipped. */
function withEvent(metrics, event) {
  if (event.type !== "metrics") return metrics;
  const { step, total_steps: _, ...values } = event.data;
  const next = new Map(metrics);
  for (const [name, value] of Object.entries(values)) {
    const isCopy = name.startsWith("full_") || !(typeof value === "number");
    const isOpenAI =
      name.endsWith("mean_token_accuracy") && `${name.split("_")[0]}_agreement` in values;
    if (!isCopy && !isOpenAI) next.set(name, withPoint(next.get(name) ?? [], step, value));
  }
  return next;
}

/**
 * Returns a page of the newest events, followed by older known ones if there is no gap between the
 * two lists. Events that have arrived after the page was read remain first.
 */
function withPage(known, page) {
  const place = (event) => known.findIndex((other) => other.id === event?.id);
  const newer = known.slice(0, Math.max(0, place(page[0])));
  const last = place(page.at(-1));
  return [...newer, ...page, ...(last === -1 ? [] : known.slice(last + 1))];
}

/** Returns the events, newest first, with one more. A new stream may repeat a known event. */
function withNewest(known, event) {
  if (known.some((other) => other.id === event.id)) return known;
  return [event, ...known].slice(0, MAX_EVENTS);
}

/** Waits for some seconds, or until the signal aborts. */
function pause(seconds, abort) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    abort.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
}

/** Returns whether the same request cannot succeed later: the service has refused it. */
function isPermanent(error) {
  if (!(error instanceof ApiError) || error.status === 429) return false;
  return error.status >= 400 && error.status < 500;
}

/**
 * Passes on the events of a job until the signal aborts. Opens the stream again, with back-off,
 * when it ends. Throws ApiError if the service refuses the request.
 * @param {string} path - path of the job
 * @param {{current: string|null}} newest - holds the id of the newest known event
 * @param {AbortSignal} abort
 * @param {(event: object) => void} onEvent - must update `newest`
 * @param {() => void} onEnd - called when the service says that there are no more events
 */
async function follow(path, newest, abort, onEvent, onEnd) {
  let backoff = MIN_BACKOFF_SECONDS;
  while (!abort.aborted) {
    try {
      const query = { stream: "true", after: newest.current };
      const response = await request(withQuery(`${path}/events`, query), { signal: abort });
      for await (const event of eventsOf(response)) {
        if (abort.aborted) return;
        backoff = MIN_BACKOFF_SECONDS;
        onEvent(event);
      }
      onEnd();
    } catch (error) {
      if (abort.aborted) return;
      if (isPermanent(error)) throw error;
    }
    await pause(backoff, abort);
    backoff = Math.min(2 * backoff, MAX_BACKOFF_SECONDS);
  }
}

/** Returns the job, its metrics by name, and its events with the newest first. */
export function useLiveJob(id) {
  const path = `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
  const [job, setJob] = useState(null);
  const [metrics, setMetrics] = useState(new Map());
  const [events, setEvents] = useState([]);
  const [error, setError] = useState(null);
  const [numTries, setNumTries] = useState(0);
  const newestEvent = useRef(null);
  const status = useRef(null);
  const wasLive = useRef(false);

  const reload = useCallback(async () => {
    try {
      const next = await call(path);
      if (status.current !== null && status.current !== next.status)
        announce(`The job is ${next.status}`);
      status.current = next.status;
      setJob(next);
      setError(null);
    } catch (fault) {
      setError(fault);
    }
  }, [path]);

  const load = useCallback(async () => {
    try {
      const [loaded, series, page] = await Promise.all([
        call(path),
        call(`${path}/metrics`),
        call(`${path}/events?limit=100`),
      ]);
      if (!wasLive.current) newestEvent.current = page.data[0]?.id ?? null; // no stream is open
      status.current = loaded.status;
      setMetrics(seriesByName(series));
      setEvents((old) => withPage(old, page.data));
      setJob(loaded);
      setError(null);
    } catch (fault) {
      setError(fault);
    }
  }, [path]);
  useEffect(() => {
    load();
  }, [load, numTries]);

  const isLive = job !== null && !ENDED.has(job.status) && job.status !== "paused";
  const visible = isVisible.value;
  useEffect(() => {
    if (!isLive || !visible) return undefined;
    const abort = new AbortController();
    const onEvent = (event) => {
      newestEvent.current = event.id;
      setEvents((old) => withNewest(old, event));
      setMetrics((old) => withEvent(old, event));
      if (event.type === "state" || event.type === "stage") reload();
    };
    follow(path, newestEvent, abort.signal, onEvent, reload).catch(setError);
    return () => abort.abort();
  }, [path, isLive, visible, numTries]);
  useEffect(() => {
    // The stream was closed when the job ended, perhaps before it had delivered everything.
    if (!isLive && wasLive.current) load();
    wasLive.current = isLive;
  }, [isLive]);
  usePolling(reload, isLive ? POLL_SECONDS : null);
  const retry = () => setNumTries(numTries + 1);
  return { job, metrics, events, error, retry, setJob };
}
