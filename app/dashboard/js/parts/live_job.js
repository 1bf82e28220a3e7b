/**
 * Keeps a job, its metrics and its events up to date while it runs. A job that has ended costs no
 * requests.
 */

import { useCallback, useEffect, useRef, useState } from "../html.js";
import { ApiError, call, eventsOf, request, withQuery } from "../api.js";
import { isVisible, usePolling } from "../live.js";
import { ENDED, seriesByName, withPoint } from "./jobs.js";
import { announce } from "./ui.js";

const POLL_SECONDS = 2;
const RETRY_SECONDS = 2;
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
 * Follows the events of a job until its end. Continues after a lost connection.
 * @param {string} path @param {string|null} after - id of the last known event
 */
async function follow(path, after, abort, onEvents) {
  let last = after;
  while (!abort.aborted) {
    try {
      const query = { stream: "true", after: last };
      const response = await request(withQuery(`${path}/events`, query), { signal: abort });
      for await (const event of eventsOf(response)) {
        last = event.id;
        onEvents([event]);
      }
      return; // [DONE]: the job has ended
    } catch (error) {
      if (abort.aborted) return;
      if (error instanceof ApiError && error.status >= 400 && error.status < 500) throw error;
      await new Promise((resolve) => setTimeout(resolve, RETRY_SECONDS * 1000));
    }
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

  useEffect(() => {
    const load = async () => {
      try {
        const [first, series, page] = await Promise.all([
          call(path),
          call(`${path}/metrics`),
          call(`${path}/events?limit=100`),
        ]);
        newestEvent.current = page.data[0]?.id ?? null;
        status.current = first.status;
        setMetrics(seriesByName(series));
        setEvents(page.data);
        setJob(first);
        setError(null);
      } catch (fault) {
        setError(fault);
      }
    };
    load();
  }, [path, numTries]);

  const isLive = job !== null && !ENDED.has(job.status) && job.status !== "paused";
  const visible = isVisible.value;
  useEffect(() => {
    if (!isLive || !visible) return undefined;
    const abort = new AbortController();
    const onEvents = (fresh) => {
      newestEvent.current = fresh.at(-1).id;
      setEvents((old) => [...fresh.toReversed(), ...old].slice(0, MAX_EVENTS));
      setMetrics((old) => fresh.reduce(withEvent, old));
      if (fresh.some((event) => event.type === "state" || event.type === "stage")) reload();
    };
    follow(path, newestEvent.current, abort.signal, onEvents).catch(setError);
    return () => abort.abort();
  }, [path, isLive, visible]);
  usePolling(reload, isLive ? POLL_SECONDS : null);
  const retry = () => setNumTries(numTries + 1);
  return { job, metrics, events, error, retry, setJob };
}
