/** Estimate of the time, memory and disk that a job will need. */

import { html, useEffect, useState } from "../html.js";
import { call } from "../api.js";
import { bytes, duration, integer, plural, words } from "../format.js";
import { ErrorNotice, Facts, Section } from "./ui.js";

const PATH = "/v1/fine_tuning/jobs/estimate";
const WAIT_MS = 500; // after the last change of the form

/** Requests an estimate when the body has not changed for a moment. */
function useEstimate(body) {
  const [state, setState] = useState({ value: null, error: null });
  const text = body && JSON.stringify(body);
  useEffect(() => {
    if (!text) {
      setState({ value: null, error: null });
      return undefined;
    }
    const abort = new AbortController();
    const timer = setTimeout(() => {
      call(PATH, { method: "POST", json: JSON.parse(text), signal: abort.signal }).then(
        (value) => setState({ value, error: null }),
        (error) => error.name !== "AbortError" && setState({ value: null, error }),
      );
    }, WAIT_MS);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [text]);
  return state;
}

export function Estimate({ body }) {
  const { value, error } = useEstimate(body);
  return html`<${Section} title="Estimate">
    ${
      !value &&
      !error &&
      html`<p class="muted">Choose a file and a model to see what the job will need.</p>`
    }
    <${ErrorNotice} error=${error} />
    ${value && html`<${Values} value=${value} />`}
  <//>`;
}

function workersText({ alive, busy }) {
  return alive === 0 ? "none is running" : `${alive} running, ${busy} of them busy`;
}

function Values({ value }) {
  const parts = Object.entries(value.seconds ?? {}).filter(
    ([name, seconds]) => name !== "total" && seconds > 0,
  );
  return html`<div aria-live="polite">
      <${Facts}
        pairs=${[
          [
            "Time",
            value.seconds
              ? html`<strong>${duration(value.seconds.total)}</strong>`
              : "unknown until a worker has run a job",
          ],
          ...parts.map(([name, seconds]) => [`· ${words(name)}`, duration(seconds)]),
          ["Rows", integer(value.num_rows)],
          ["Tokens", integer(value.num_tokens)],
          ["Steps", integer(value.num_steps)],
          ["Peak memory", bytes(value.peak_memory_bytes)],
          ["Disk", bytes(value.disk_bytes)],
          ["Queue", value.queue && `${plural(value.queue.jobs_before, "job")} before it`],
          ["Train workers", value.workers && workersText(value.workers)],
        ]}
      />
      <p>
        ${value.fits ? "The job fits on the workers." : html`<strong>The job does not fit.</strong>`}
      </p>
    </div>
    ${
      value.notes?.length > 0 &&
      html`<details open=${!value.fits}>
        <summary>What the estimate rests on</summary>
        <ul>
          ${value.notes.map((note) => html`<li key=${note}>${note}</li>`)}
        </ul>
      </details>`
    }`;
}
