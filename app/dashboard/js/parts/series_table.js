/** The data of a chart as a table with pages. It is built when the user opens it. */

import { html, useState } from "../html.js";
import { integer } from "../format.js";
import { aligned } from "./thinning.js";
import { DataTable } from "./ui.js";

const PAGE_ROWS = 25;

export function SeriesTable({ title, series, format }) {
  const [isOpen, setOpen] = useState(false);
  return html`<details class="data" onToggle=${(event) => setOpen(event.currentTarget.open)}>
    <summary>Data of this chart<span class="visually-hidden">: ${title}</span></summary>
    ${isOpen && html`<${Pages} title=${title} series=${series} format=${format} />`}
  </details>`;
}

function Pages({ title, series, format }) {
  const [page, setPage] = useState(0);
  const [steps, ...columns] = aligned(series.map((one) => one.points));
  const numPages = Math.max(1, Math.ceil(steps.length / PAGE_ROWS));
  const rows = steps
    .slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS)
    .map((step, i) => ({ step, values: columns.map((column) => column[page * PAGE_ROWS + i]) }));
  const headings = [
    { title: "Step", cell: (row) => integer(row.step) },
    ...series.map((one, i) => ({
      title: one.name,
      isNumber: true,
      cell: (row) => (row.values[i] === null ? "" : format(row.values[i])),
    })),
  ];
  return html`<${DataTable}
      caption=${`Data: ${title}`}
      columns=${headings}
      rows=${rows}
      rowKey=${(row) => row.step}
    />
    <div class="actions">
      <button type="button" class="small" disabled=${page === 0} onClick=${() => setPage(page - 1)}>
        Previous rows
      </button>
      <span class="muted">Page ${page + 1} of ${numPages}</span>
      <button
        type="button"
        class="small"
        disabled=${page + 1 >= numPages}
        onClick=${() => setPage(page + 1)}
      >
        Next rows
      </button>
    </div>`;
}
