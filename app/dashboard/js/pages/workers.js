/** Serve workers with their models, and running jobs with their leases. */

import { html } from "../html.js";
import { call } from "../api.js";
import { bytes, clock, duration, integer, words } from "../format.js";
import { usePolling, useResource } from "../live.js";
import { link } from "../router.js";
import {
  DataTable,
  Empty,
  ErrorNotice,
  Loading,
  PageHead,
  Progress,
  Section,
  Status,
} from "../parts/ui.js";

const POLL_SECONDS = 3;
const RHYTHM = `, every ${POLL_SECONDS} s while there is work`;

async function load() {
  return { ...(await call("/v1/workers")), at: Date.now() / 1000 };
}

function isBusy(workers) {
  const isServing = workers.serve_workers.some(
    (worker) =>
      worker.num_running + worker.num_waiting > 0 ||
      worker.models.some((model) => model.state === "loading"),
  );
  return isServing || workers.num_running_jobs > 0;
}

const MODEL_COLUMNS = [
  {
    title: "Model",
    cell: (row) =>
      row.model
        ? html`<a href=${link(["model", row.model])}>${row.model}</a>`
        : html`<span class="muted">Another model</span>`,
  },
  {
    title: "State",
    cell: (row) =>
      row.state === "loading"
        ? html`<${Progress} value=${row.percent} label="Loading" />`
        : html`<${Status}
              value=${row.state}
            />${row.is_pinned && html` <span class="tag">pinned</span>`}
            ${row.error && html`<p>${row.error}</p>`}`,
  },
  { title: "Memory", isNumber: true, cell: (row) => bytes(row.bytes) },
  { title: "Weights", cell: (row) => row.weights ?? "" },
  {
    title: "First token",
    isNumber: true,
    cell: (row) => (row.first_token_ms ? `${integer(row.first_token_ms)} ms` : ""),
  },
];

function ServeWorker({ worker }) {
  const share = (100 * worker.resident_bytes) / worker.max_resident_bytes;
  return html`<article class="worker">
    <div class="row">
      <h3 class="mono">${worker.id}</h3>
      <${Status}
        value=${worker.state}
        note=${worker.state === "stalled" ? duration(worker.stalled_seconds) : null}
      />
    </div>
    <dl class="figures">
      <div class="figure">
        <dt>Running</dt>
        <dd>${worker.num_running} <span class="muted">of ${worker.max_running}</span></dd>
      </div>
      <div class="figure">
        <dt>Waiting</dt>
        <dd>${worker.num_waiting}</dd>
      </div>
      <div class="figure">
        <dt>Heartbeat</dt>
        <dd>${duration(worker.heartbeat_age_seconds)}</dd>
      </div>
      <div class="figure">
        <dt>Engines</dt>
        <dd>${worker.engines.join(", ")}</dd>
      </div>
      <div class="figure">
        <dt>Memory of models</dt>
        <dd>
          ${bytes(worker.resident_bytes)}${" "}
          <span class="muted">of ${bytes(worker.max_resident_bytes)}</span>
          <${Progress} value=${share} label="Memory of models" />
        </dd>
      </div>
    </dl>
    ${
      worker.models.length > 0
        ? html`<${DataTable}
            caption=${`Models on ${worker.id}`}
            columns=${MODEL_COLUMNS}
            rows=${worker.models}
            rowKey=${(row) => worker.models.indexOf(row)}
          />`
        : html`<p class="muted">No model is loaded. The first request for a model loads it.</p>`
    }
  </article>`;
}

const JOB_COLUMNS = [
  {
    title: "Job",
    cell: (job) =>
      job.kind === "distillation"
        ? html`<a href=${link(["job", job.id])}>${job.name}</a>`
        : html`${job.name} <span class="muted">(${words(job.kind).toLowerCase()})</span>`,
  },
  { title: "Worker", cell: (job) => html`<code>${job.worker}</code>` },
  { title: "Stage", cell: (job) => words(job.stage) },
  {
    title: "Progress",
    cell: (job) => html`<${Progress} value=${job.percent} label=${`Progress of ${job.name}`} />`,
  },
  { title: "Attempt", isNumber: true, cell: (job) => job.attempt },
  {
    title: "Heartbeat",
    isNumber: true,
    cell: (job) =>
      html`${duration(job.heartbeat_age_seconds)}
      ${job.is_late && html` <span class="tag warn">late</span>`}`,
  },
  {
    title: "Lease ends in",
    isNumber: true,
    cell: (job) => duration(Math.max(0, job.lease_seconds)),
  },
];

export default function Workers() {
  const workers = useResource(load, []);
  const { value } = workers;
  usePolling(workers.reload, value && isBusy(value) ? POLL_SECONDS : null);
  const others = value ? value.num_running_jobs - value.running_jobs.length : 0;
  return html`<${PageHead}
      title="Workers"
      actions=${html`<button type="button" onClick=${workers.reload}>Refresh</button>`}
    >
      ${value && html`<p class="muted">As of ${clock(value.at)}${isBusy(value) && RHYTHM}.</p>`}
    <//>
    <${ErrorNotice} error=${workers.error} onRetry=${workers.reload} />
    ${workers.isLoading && html`<${Loading} what="Loading the workers" />`}
    ${
      value &&
      html`<${Section} title="Serve workers">
          ${
            value.serve_workers.length === 0 &&
            html`<${Empty} title="No serve worker is running">
              <p>
                Jobs are accepted, but no model can answer. Start one with${" "}
                <code>stillhouse serve-worker</code>, or everything with <code>make up</code>.
              </p>
            <//>`
          }
          ${value.serve_workers.map(
            (worker) => html`<${ServeWorker} key=${worker.id} worker=${worker} />`,
          )}
        <//>
        <${Section} title="Running jobs">
          ${
            value.running_jobs.length > 0
              ? html`<${DataTable}
                  caption="Running jobs and their leases"
                  columns=${JOB_COLUMNS}
                  rows=${value.running_jobs}
                  rowKey=${(job) => job.id}
                />`
              : html`<p class="muted">No job that this key may see is running.</p>`
          }
          ${others > 0 && html`<p class="muted">${others} more that this key may not see.</p>`}
        <//>`
    }`;
}
