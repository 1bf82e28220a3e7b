/** All jobs of the project: live state, filter and search, and the selection to compare. */

import { html, useEffect, useState } from "../html.js";
import { call, withQuery } from "../api.js";
import { duration, integer, words } from "../format.js";
import { useAction, usePolling, useResource } from "../live.js";
import { go, link } from "../router.js";
import { ACTIVE, MAX_COMPARED, STATUSES, nameOf, remainingSeconds } from "../parts/jobs.js";
import {
  Ago,
  DataTable,
  Empty,
  ErrorNotice,
  Loading,
  PageHead,
  Progress,
  Status,
} from "../parts/ui.js";

const PATH = "/v1/fine_tuning/jobs";
const PAGE_JOBS = 50;
const POLL_SECONDS = 2;

function matches(job, status, text) {
  if (status && job.status !== status) return false;
  const searched = [nameOf(job), job.id, job.model, job.teacher, job.fine_tuned_model];
  searched.push(...Object.entries(job.metadata).map((pair) => pair.join("=")));
  return searched.some((value) => value?.toLowerCase().includes(text.toLowerCase()));
}

/**
 * Returns the newest page, followed by the known jobs that are older than its last one. So a job
 * that new jobs push off the page remains, and a deleted job of the page disappears.
 */
function merged(page, known) {
  if (!page.has_more) return page.data;
  const ids = new Set(page.data.map((job) => job.id));
  const oldest = page.data.at(-1).created_at;
  return [...page.data, ...known.filter((job) => job.created_at <= oldest && !ids.has(job.id))];
}

/** Loads the newest jobs, keeps them up to date, and appends older ones. */
function useJobs() {
  const newest = useResource(() => call(withQuery(PATH, { limit: PAGE_JOBS })), []);
  const [jobs, setJobs] = useState([]);
  const [hasMoreAfter, setHasMoreAfter] = useState(null); // after the last older page
  useEffect(() => {
    if (newest.value) setJobs((known) => merged(newest.value, known));
  }, [newest.value]);
  const hasMore = hasMoreAfter ?? newest.value?.has_more ?? false;
  const more = useAction(async () => {
    const page = await call(withQuery(PATH, { limit: PAGE_JOBS, after: jobs.at(-1).id }));
    setJobs((known) => {
      const ids = new Set(known.map((job) => job.id));
      return [...known, ...page.data.filter((job) => !ids.has(job.id))];
    });
    setHasMoreAfter(page.has_more);
  });
  const isActive = newest.value?.data.some((job) => ACTIVE.has(job.status));
  usePolling(newest.reload, isActive ? POLL_SECONDS : null);
  return { jobs, hasMore, more, newest };
}

function columns(selected, toggle) {
  return [
    {
      title: "Job",
      cell: (job) =>
        html`<div class="job-name">
          <input
            type="checkbox"
            aria-label=${`Select ${nameOf(job)} (${job.id}) to compare`}
            checked=${selected.has(job.id)}
            onChange=${() => toggle(job.id)}
          />
          <div>
            <a href=${link(["job", job.id])}>${nameOf(job)}</a>
            <div class="muted mono small-text">${job.id}</div>
          </div>
        </div>`,
    },
    {
      title: "Status",
      cell: (job) => html`<${Status} value=${job.status} note=${pending(job)} />`,
    },
    { title: "Progress", cell: (job) => html`<${JobProgress} job=${job} />` },
    {
      title: "Time left",
      isNumber: true,
      cell: (job) => (job.status === "running" ? duration(remainingSeconds(job)) : ""),
    },
    {
      title: "Method",
      cell: (job) =>
        html`${words(job.method.type)}
          <div class="muted small-text">${job.teacher ? `by ${job.teacher}` : job.model}</div>`,
    },
    { title: "Created", cell: (job) => html`<${Ago} at=${job.created_at} />` },
  ];
}

function pending(job) {
  if (job.queue) return `${job.queue.position} of ${job.queue.depth}`;
  if (job.cancel_requested_at && job.status === "running") return "cancelling";
  if (job.pause_requested_at && job.status === "running") return "pausing";
  return null;
}

function JobProgress({ job }) {
  if (job.status === "succeeded")
    return html`<span class="muted">${duration(job.finished_at - job.started_at)}</span>`;
  if (!job.stage) return "";
  const { percent, step, total_steps: total } = job.progress;
  return html`<div class="job-progress">
    <${Progress} value=${percent} label=${`Progress of ${nameOf(job)}`} />
    <span class="muted small-text">
      ${words(job.stage)}${step && total ? `, step ${integer(step)} of ${integer(total)}` : ""}
    </span>
  </div>`;
}

function Toolbar({ filter, setFilter, selected, onRefresh }) {
  return html`<div class="toolbar" role="search">
    <label>
      <span class="visually-hidden">Search jobs</span>
      <input
        type="search"
        placeholder="Search name, id, model or metadata"
        value=${filter.text}
        onInput=${(event) => setFilter({ ...filter, text: event.currentTarget.value })}
      />
    </label>
    <label>
      <span class="visually-hidden">Status</span>
      <select
        value=${filter.status}
        onChange=${(event) => setFilter({ ...filter, status: event.currentTarget.value })}
      >
        <option value="">All states</option>
        ${STATUSES.map((status) => html`<option value=${status}>${words(status)}</option>`)}
      </select>
    </label>
    <button type="button" onClick=${onRefresh}>Refresh</button>
    <button
      type="button"
      disabled=${selected.size < 2 || selected.size > MAX_COMPARED}
      onClick=${() => go(["compare"], { jobs: [...selected].join(",") })}
    >
      Compare ${selected.size || ""} selected
    </button>
    ${
      selected.size > MAX_COMPARED &&
      html`<p class="muted" role="status">Select at most ${MAX_COMPARED} jobs to compare.</p>`
    }
  </div>`;
}

export default function Jobs() {
  const { jobs, hasMore, more, newest } = useJobs();
  const [filter, setFilter] = useState({ status: "", text: "" });
  const [selected, setSelected] = useState(new Set());
  const toggle = (id) => {
    const next = new Set(selected);
    if (!next.delete(id)) next.add(id);
    setSelected(next);
  };
  const shown = jobs.filter((job) => matches(job, filter.status, filter.text));
  const isFiltered = filter.status !== "" || filter.text !== "";
  return html`<${PageHead}
      title="Jobs"
      actions=${html`<a class="button primary" href="#/new">New job</a>`}
    />
    <${Toolbar}
      filter=${filter}
      setFilter=${setFilter}
      selected=${selected}
      onRefresh=${newest.reload}
    />
    <${ErrorNotice} error=${newest.error} onRetry=${newest.reload} />
    ${newest.isLoading && html`<${Loading} what="Loading jobs" />`}
    ${newest.value?.data.length === 0 && html`<${NoJobs} />`}
    ${
      shown.length > 0 &&
      html`<${DataTable}
        caption="Jobs, newest first"
        columns=${columns(selected, toggle)}
        rows=${shown}
        rowKey=${(job) => job.id}
      />`
    }
    ${
      isFiltered &&
      newest.value &&
      html`<p class="muted" role="status">
        ${shown.length} of the ${jobs.length} newest jobs match.
      </p>`
    }
    <${ErrorNotice} error=${more.error} />
    ${
      hasMore &&
      html`<button type="button" disabled=${more.isBusy} onClick=${() => more.run()}>
        Load older jobs
      </button>`
    }`;
}

function NoJobs() {
  return html`<${Empty} title="No jobs yet">
    <p>
      A job trains a small model from a large one. You need a teacher among the
      <a href="#/models">models</a> and a file with a few hundred prompts.
    </p>
    <a class="button primary" href="#/new">Create the first job</a>
  <//>`;
}
