/** The history of a job, newest first. */

import { html, useState } from "../html.js";
import { call, withQuery } from "../api.js";
import { clock, date } from "../format.js";
import { useAction } from "../live.js";
import { ErrorNotice, Section } from "./ui.js";

const NUM_SHOWN = 30;
const MARKS = { warn: "Warning: ", error: "Error: " };

export function JobEvents({ job, events }) {
  const [older, setOlder] = useState([]);
  const [hasMore, setHasMore] = useState(true);
  const [withMetrics, setWithMetrics] = useState(false);
  const [isLong, setLong] = useState(false);
  const more = useAction(async () => {
    const after = [...events, ...older].at(-1)?.id;
    const page = await call(
      withQuery(`/v1/fine_tuning/jobs/${job.id}/events`, { limit: 100, after }),
    );
    setOlder([...older, ...page.data]);
    setHasMore(page.has_more);
  });
  const all = [...events, ...older].filter((event) => withMetrics || event.type !== "metrics");
  const shown = isLong ? all : all.slice(0, NUM_SHOWN);
  const isComplete = !hasMore || [...events, ...older].length < 100;
  const toggle = html`<label class="check">
    <input type="checkbox" checked=${withMetrics} onChange=${() => setWithMetrics(!withMetrics)} />
    Show steps
  </label>`;
  return html`<${Section} title="Events" actions=${toggle}>
    <ol class="events" tabindex="0" aria-label="Events, newest first">
      ${shown.map(
        (event) =>
          html`<li key=${event.id} data-level=${event.level}>
            <time
              datetime=${new Date(event.created_at * 1000).toISOString()}
              title=${date(event.created_at)}
            >
              ${clock(event.created_at)}
            </time>
            <span
              >${MARKS[event.level] && html`<strong>${MARKS[event.level]}</strong>`}${event.message}</span
            >
          </li>`,
      )}
    </ol>
    ${all.length === 0 && html`<p class="muted">No events yet.</p>`}
    <${ErrorNotice} error=${more.error} />
    <div class="actions">
      ${
        all.length > NUM_SHOWN &&
        html`<button type="button" class="small" onClick=${() => setLong(!isLong)}>
          ${isLong ? "Show fewer" : `Show all ${all.length}`}
        </button>`
      }
      ${
        !isComplete &&
        html`<button
          type="button"
          class="small"
          disabled=${more.isBusy}
          onClick=${() => more.run()}
        >
          Load older events
        </button>`
      }
    </div>
  <//>`;
}
