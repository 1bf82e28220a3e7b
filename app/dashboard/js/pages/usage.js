/** Requests and tokens per API key and per model, from the usage report of the API. */

import { html, useMemo, useState } from "../html.js";
import { call, withQuery } from "../api.js";
import { count, integer } from "../format.js";
import { useResource } from "../live.js";
import { InlineSelect } from "../parts/fields.js";
import { DataTable, Empty, ErrorNotice, Loading, PageHead, Section } from "../parts/ui.js";

const PATH = "/v1/organization/usage/completions";
const DAY_SECONDS = 86_400;
const SPANS = { 1: "Last day", 7: "Last 7 days", 30: "Last 30 days" };
const GROUPS = { api_key_id: "API key", model: "Model", project_id: "Project" };

/** Returns the buckets of the report, with the group that they were loaded for. */
async function load(days, group) {
  const start = Math.floor(Date.now() / 1000 / DAY_SECONDS - days + 1) * DAY_SECONDS;
  const query = { start_time: start, bucket_width: "1d", group_by: group, limit: 31 };
  const buckets = [];
  let page = null;
  do {
    const report = await call(withQuery(PATH, { ...query, page }));
    buckets.push(...report.data);
    page = report.has_more ? report.next_page : null;
  } while (page !== null);
  return { buckets, group };
}

/** Returns the sums of each group over all buckets, those with most tokens first. */
function totals({ buckets, group }) {
  const sums = new Map();
  for (const result of buckets.flatMap((bucket) => bucket.results)) {
    const name = result[group] ?? "unknown";
    const sum = sums.get(name) ?? { name, requests: 0, input: 0, cached: 0, output: 0 };
    sum.requests += result.num_model_requests;
    sum.input += result.input_tokens;
    sum.cached += result.input_cached_tokens ?? 0;
    sum.output += result.output_tokens;
    sums.set(name, sum);
  }
  return [...sums.values()].sort((a, b) => b.input + b.output - a.input - a.output);
}

/** A bar per day as SVG, with the figures in the table below it. */
function Days({ buckets }) {
  const days = buckets.map((bucket) => ({
    at: bucket.start_time,
    tokens: bucket.results.reduce(
      (sum, result) => sum + result.input_tokens + result.output_tokens,
      0,
    ),
    requests: bucket.results.reduce((sum, result) => sum + result.num_model_requests, 0),
  }));
  const most = Math.max(1, ...days.map((day) => day.tokens));
  const name = (day) =>
    new Date(day.at * 1000).toLocaleDateString("en-GB", {
      day: "numeric",
      month: "short",
      timeZone: "UTC",
    });
  const columns = [
    { title: "Day (UTC)", cell: name },
    { title: "Tokens", isNumber: true, cell: (day) => integer(day.tokens) },
    { title: "Requests", isNumber: true, cell: (day) => integer(day.requests) },
  ];
  return html`<figure class="chart">
    <figcaption>
      <span class="chart-title">Tokens per day</span> <span class="muted">input and output</span>
    </figcaption>
    <svg
      class="bars"
      viewBox=${`0 0 ${days.length * 24} 120`}
      preserveAspectRatio="none"
      role="img"
      aria-label=${`Tokens per day, at most ${count(most)}`}
    >
      ${days.map((day, i) => {
        const height = (110 * day.tokens) / most;
        return html`<rect
          key=${day.at}
          x=${i * 24 + 3}
          y=${118 - height}
          width="18"
          height=${Math.max(1, height)}
        >
          <title>${name(day)}: ${integer(day.tokens)} tokens</title>
        </rect>`;
      })}
    </svg>
    <details class="data">
      <summary>Data of this chart<span class="visually-hidden">: tokens per day</span></summary>
      <${DataTable}
        caption="Tokens per day"
        columns=${columns}
        rows=${days}
        rowKey=${(day) => day.at}
      />
    </details>
  </figure>`;
}

export default function Usage() {
  const [days, setDays] = useState(7);
  const [group, setGroup] = useState("api_key_id");
  const usage = useResource(() => load(days, group), [days, group]);
  // The old report remains visible while another one is loaded, so it keeps its own headings.
  const shown = usage.value ?? { buckets: [], group };
  const rows = useMemo(() => totals(shown), [usage.value]);
  const columns = [
    { title: GROUPS[shown.group], cell: (row) => html`<code>${row.name}</code>` },
    { title: "Requests", isNumber: true, cell: (row) => integer(row.requests) },
    { title: "Input tokens", isNumber: true, cell: (row) => integer(row.input) },
    { title: "From the prefix cache", isNumber: true, cell: (row) => integer(row.cached) },
    { title: "Output tokens", isNumber: true, cell: (row) => integer(row.output) },
  ];
  return html`<${PageHead} title="Usage" />
    <div class="toolbar">
      <${InlineSelect}
        label="Time"
        options=${SPANS}
        value=${days}
        onChange=${(value) => setDays(Number(value))}
      />
      <${InlineSelect} label="By" options=${GROUPS} value=${group} onChange=${setGroup} />
      <button type="button" onClick=${usage.reload}>Refresh</button>
    </div>
    <${ErrorNotice} error=${usage.error} onRetry=${usage.reload} />
    ${usage.isLoading && html`<${Loading} what="Loading the usage" />`}
    ${
      usage.value &&
      rows.length === 0 &&
      html`<${Empty} title="No requests in this time"
        ><p>
          Ask a model in the <a href="#/playground">playground</a>, or choose a longer time.
        </p><//
      >`
    }
    ${
      rows.length > 0 &&
      html`<${Section} title="Tokens"><${Days} buckets=${shown.buckets} /><//>
        <${Section} title=${`By ${GROUPS[shown.group].toLowerCase()}`}>
          <${DataTable}
            caption="Usage"
            columns=${columns}
            rows=${rows}
            rowKey=${(row) => row.name}
          />
        <//>`
    }`;
}
