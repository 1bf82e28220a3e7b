/** Overlays the curves of several jobs. The address holds their ids. */

import { html, useMemo, useState } from "../html.js";
import { call } from "../api.js";
import { useResource } from "../live.js";
import { link, replaceQuery, route } from "../router.js";
import { GROUPS, GroupChart } from "../parts/curves.js";
import { QUALITY_METRICS } from "../parts/job_result.js";
import { MAX_COMPARED, nameOf, seriesByName } from "../parts/jobs.js";
import { DataTable, Empty, ErrorNotice, Loading, PageHead, Section, Status } from "../parts/ui.js";

/** Loads the jobs. Returns those that could be read, and the others with their errors. */
async function load(ids) {
  const path = (id) => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
  const outcomes = await Promise.all(
    ids.map(async (id) => {
      try {
        const [job, metrics] = await Promise.all([call(path(id)), call(`${path(id)}/metrics`)]);
        return { job, metrics: seriesByName(metrics) };
      } catch (error) {
        return { id, error };
      }
    }),
  );
  return {
    runs: outcomes.filter(({ job }) => job),
    failures: outcomes.filter(({ error }) => error),
  };
}

/** Returns names that tell the runs apart: the last characters of the id follow equal names. */
function labels(runs) {
  const names = runs.map(({ job }) => nameOf(job));
  return runs.map(({ job }, i) =>
    names.filter((name) => name === names[i]).length > 1
      ? `${names[i]} …${job.id.slice(-6)}`
      : names[i],
  );
}

/** One chart per metric that at least one of the jobs has. Held-out metrics come first. */
function charts(runs, kind) {
  const names = labels(runs);
  return GROUPS.flatMap((group) =>
    Object.entries(group.names)
      .filter(
        ([name, label]) => kind === "all" || label !== "Training" || name.startsWith("valid_"),
      )
      .map(([name, label]) => ({
        ...group,
        title: label === group.title ? label : `${group.title}: ${label.toLowerCase()}`,
        series: runs
          .map(({ metrics }, i) => ({ name: names[i], points: metrics.get(name) ?? [], style: i }))
          .filter((series) => series.points.length > 0),
      })),
  ).filter((chart) => chart.series.length > 0);
}

function Picker({ ids, onChange }) {
  const jobs = useResource(() => call("/v1/fine_tuning/jobs?limit=100"), []);
  const chosen = new Set(ids);
  const isFull = ids.length >= MAX_COMPARED;
  const add = ({ currentTarget: { value } }) => value && onChange([...ids, value]);
  const offered = (jobs.value?.data ?? []).filter((job) => !chosen.has(job.id));
  return html`<div class="toolbar">
    <label class="inline">
      Add a job
      <select value="" disabled=${isFull || offered.length === 0} onChange=${add}>
        <option value="">${isFull ? `At most ${MAX_COMPARED} jobs` : "Choose a job"}</option>
        ${offered.map(
          (job) => html`<option value=${job.id}>${nameOf(job)} (${job.status}, ${job.id})</option>`,
        )}
      </select>
    </label>
    <${ErrorNotice} error=${jobs.error} />
  </div>`;
}

function Results({ runs, onRemove }) {
  const student = ({ job }) => job.result?.student ?? job.result?.after ?? job.latest_metrics;
  const metrics = QUALITY_METRICS.filter(([name]) =>
    runs.some((run) => student(run)?.[name] !== undefined),
  );
  const names = labels(runs);
  const columns = [
    { title: "Job", cell: (i) => html`<a href=${link(["job", runs[i].job.id])}>${names[i]}</a>` },
    { title: "Status", cell: (i) => html`<${Status} value=${runs[i].job.status} />` },
    ...metrics.map(([name, title, format]) => ({
      title,
      isNumber: true,
      cell: (i) => format(student(runs[i])?.[name]),
    })),
    {
      title: "Divergence",
      cell: (i) => runs[i].job.method.distillation?.objective?.divergence ?? "",
    },
    {
      title: "",
      cell: (i) =>
        html`<button type="button" class="small" onClick=${() => onRemove(runs[i].job.id)}>
          Remove<span class="visually-hidden"> ${names[i]}</span>
        </button>`,
    },
  ];
  return html`<${DataTable}
    caption="Compared jobs"
    columns=${columns}
    rows=${runs.map((_, i) => i)}
    rowKey=${(i) => runs[i].job.id}
  />`;
}

/** Jobs that could not be read, such as deleted ones. */
function Failures({ failures, onRemove, onRetry }) {
  return failures.map(
    ({ id, error }) =>
      html`<div key=${id}>
        <${ErrorNotice}
          error=${{ message: `The job ${id} is not shown: ${error.message}` }}
          onRetry=${onRetry}
        />
        <button type="button" class="small" onClick=${() => onRemove(id)}>
          Remove<span class="visually-hidden"> ${id}</span>
        </button>
      </div>`,
  );
}

export default function Compare() {
  const [requested] = useState([
    ...new Set((route.value.query.get("jobs") ?? "").split(",").filter(Boolean)),
  ]);
  const [ids, setIds] = useState(requested.slice(0, MAX_COMPARED));
  const [kind, setKind] = useState("held-out");
  const change = (next) => {
    setIds(next);
    replaceQuery(next.length ? { jobs: next.join(",") } : {});
  };
  const remove = (id) => change(ids.filter((one) => one !== id));
  const loaded = useResource(() => load(ids), [ids.join(",")]);
  const { runs, failures } = loaded.value ?? { runs: [], failures: [] };
  const shown = useMemo(() => charts(runs, kind), [loaded.value, kind]);
  return html`<${PageHead} title="Compare" />
    <${Picker} ids=${ids} onChange=${change} />
    ${
      requested.length > MAX_COMPARED &&
      html`<p class="notice" role="status">
        The address has ${requested.length} jobs. Only the first ${MAX_COMPARED} of them are shown.
      </p>`
    }
    <${Failures} failures=${failures} onRemove=${remove} onRetry=${loaded.reload} />
    ${
      ids.length === 0 &&
      html`<${Empty} title="No jobs are chosen">
        <p>
          Choose jobs above, or select them in the <a href="#/jobs">list of jobs</a>, to see their
          curves in one chart.
        </p>
      <//>`
    }
    ${loaded.isLoading && ids.length > 0 && html`<${Loading} what="Loading the curves" />`}
    ${
      runs.length > 0 &&
      html`<${Section} title="Results">
          <${Results} runs=${runs} onRemove=${remove} />
        <//>
        <${Section}
          title="Curves"
          actions=${html`<label class="inline">
            Rows
            <select value=${kind} onChange=${(event) => setKind(event.currentTarget.value)}>
              <option value="held-out">Held-out</option>
              <option value="all">Held-out and training</option>
            </select>
          </label>`}
        >
          ${
            shown.length === 0
              ? html`<p class="muted">These jobs have no metrics yet.</p>`
              : html`<div class="charts">
                  ${shown.map((chart) => html`<${GroupChart} key=${chart.title} group=${chart} />`)}
                </div>`
          }
        <//>`
    }`;
}
