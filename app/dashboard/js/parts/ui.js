/** Components that all pages use: icons, badges, notices, fields, tables and text to copy. */

import { html, signal, useId, useLayoutEffect, useRef, useState } from "../html.js";
import { ago, date, words } from "../format.js";

const PATHS = {
  succeeded: "M3.5 8.5l3 3 6-7",
  failed: "M4 4l8 8M12 4l-8 8",
  cancelled: "M4 8h8",
  running: "M8 3a5 5 0 1 1-5 5",
  queued: "M8 4.5V8l2.5 1.5M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11",
  paused: "M6 4v8M10 4v8",
  jobs: "M2.5 13.5V9M6.5 13.5v-7M10.5 13.5v-4M14 13.5v-11",
  new: "M8 3v10M3 8h10",
  compare: "M2 12c3 0 3-8 6-8s3 8 6 8M2 6c3 0 4 5 6 5",
  models: "M8 2l5.5 3v6L8 14l-5.5-3V5zM2.5 5L8 8l5.5-3M8 8v6",
  playground: "M2.5 3h11v8h-6l-3 2.5V11h-2zM5 6h6M5 8.5h3.5",
  traffic: "M2.5 4h11M2.5 8h11M2.5 12h7",
  workers: "M3 3h10v4H3zM3 9h10v4H3zM5.5 5h.01M5.5 11h.01",
  usage: "M8 2.5v11M4 6.5c0-4 8-4 8-.5 0 4-8 1.5-8 5 0 3.5 8 3.5 8-.5",
  theme: "M8 2.5a5.5 5.5 0 1 0 0 11zM8 2.5a5.5 5.5 0 0 1 0 11",
  menu: "M2.5 4.5h11M2.5 8h11M2.5 11.5h11",
  copy: "M5.5 5.5v-3h8v8h-3M2.5 5.5h8v8h-8z",
  external: "M6 4H3v9h9v-3M9 3h4v4M13 3L7.5 8.5",
};

/** An icon of 16 by 16 pixels. Screen readers skip it, so it needs a text beside it. */
export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 16 16" aria-hidden="true" focusable="false">
    <path d=${PATHS[name]} />
  </svg>`;
}

/** The status of a job or a model: an icon and a word, so that it does not depend on colour. */
export function Status({ value, note }) {
  const icon = { resident: "succeeded", ready: "succeeded", loading: "running" }[value] ?? value;
  return html`<span class="status" data-status=${value}>
    <${Icon} name=${PATHS[icon] ? icon : "cancelled"} />${words(value)}${note ? ` (${note})` : ""}
  </span>`;
}

/** Shows the message of an error, and a button that tries again. */
export function ErrorNotice({ error, onRetry }) {
  if (!error) return null;
  return html`<div class="notice error" role="alert">
    <p>${error.message}</p>
    ${error.param && html`<p class="muted">Field: <code>${error.param}</code></p>`}
    ${onRetry && html`<button type="button" onClick=${onRetry}>Try again</button>`}
  </div>`;
}

/** Replaces an empty list with a title and the next step for the user. */
export function Empty({ title, children }) {
  return html`<div class="empty">
    <p class="empty-title">${title}</p>
    ${children}
  </div>`;
}

export function Loading({ what = "Loading" }) {
  return html`<p class="loading muted" role="status">${what} …</p>`;
}

/** A labelled form control. `control` gets the ids that connect it with label and help. */
export function Field({ label, help, control, isWide }) {
  const id = useId();
  const helpId = help ? `${id}-help` : undefined;
  return html`<div class=${`field${isWide ? " wide" : ""}`}>
    <label for=${id}>${label}</label>
    ${control({ id, "aria-describedby": helpId })}
    ${help && html`<p class="help" id=${helpId}>${help}</p>`}
  </div>`;
}

/** A table that scrolls sideways on narrow screens. It shows nothing if there are no rows. */
export function DataTable({ caption, columns, rows, rowKey, isCaptionHidden = true }) {
  const scroller = useRef(null);
  useLayoutEffect(() => {
    if (scroller.current === null) return;
    const { scrollWidth, clientWidth } = scroller.current;
    if (scrollWidth > clientWidth)
      scroller.current.tabIndex = 0; // so that the keyboard can scroll
    else scroller.current.removeAttribute("tabindex");
  });
  if (rows.length === 0) return null;
  return html`<div class="table-scroll" ref=${scroller} role="region" aria-label=${caption}>
    <table>
      <caption class=${isCaptionHidden ? "visually-hidden" : ""}>
        ${caption}
      </caption>
      <thead>
        <tr>
          ${columns.map(
            (column) =>
              html`<th scope="col" class=${column.isNumber ? "num" : ""}>${column.title}</th>`,
          )}
        </tr>
      </thead>
      <tbody>
        ${rows.map(
          (row) =>
            html`<tr key=${rowKey(row)}>
              ${columns.map((column, i) =>
                i === 0
                  ? html`<th scope="row">${column.cell(row)}</th>`
                  : html`<td class=${column.isNumber ? "num" : ""}>${column.cell(row)}</td>`,
              )}
            </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

/** A time as "5 min ago", with the date as its title. */
export function Ago({ at }) {
  if (!at) return "–";
  return html`<time datetime=${new Date(at * 1000).toISOString()} title=${date(at)}
    >${ago(at)}</time
  >`;
}

export function Progress({ value, label }) {
  const share = Math.max(0, Math.min(100, value ?? 0));
  return html`<progress max="100" value=${share} aria-label=${label}>
    ${share.toFixed(0)} %
  </progress>`;
}

/** The message that screen readers announce next. */
export const announcement = signal("");

export function announce(text) {
  announcement.value = text;
}

/** Code with a button that copies it. */
export function Code({ text, label }) {
  const [isCopied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    announce(`${label} copied`);
    setTimeout(() => setCopied(false), 2000);
  };
  return html`<div class="code">
    <div class="code-head">
      <span>${label}</span>
      ${
        navigator.clipboard &&
        html`<button type="button" class="quiet small" onClick=${copy}>
          <${Icon} name="copy" />${isCopied ? "Copied" : "Copy"}<span class="visually-hidden">
            ${label}</span
          >
        </button>`
      }
    </div>
    <pre tabindex="0" role="region" aria-label=${label}><code>${text}</code></pre>
  </div>`;
}

/** Pairs of a term and its value. Leaves out pairs without a value. */
export function Facts({ pairs }) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return html`<dl class="facts">
    ${shown.map(
      ([term, value]) =>
        html`<div key=${term}>
          <dt>${term}</dt>
          <dd>${value}</dd>
        </div>`,
    )}
  </dl>`;
}

/** A part of a page with a heading. */
export function Section({ title, actions, children, id }) {
  const headingId = useId();
  return html`<section class="card" aria-labelledby=${headingId} id=${id}>
    <div class="card-head">
      <h2 id=${headingId}>${title}</h2>
      ${actions && html`<div class="actions">${actions}</div>`}
    </div>
    ${children}
  </section>`;
}

/** The heading of a page. It gets the focus when the page opens. */
export function PageHead({ title, children, actions }) {
  return html`<div class="page-head">
    <div>
      <h1 tabindex="-1">${title}</h1>
      ${children}
    </div>
    ${actions && html`<div class="actions">${actions}</div>`}
  </div>`;
}
