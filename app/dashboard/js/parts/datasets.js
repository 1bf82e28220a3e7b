/** Data sets of stored completions: the form that makes one, and the list. */

import { html, useState } from "../html.js";
import { call } from "../api.js";
import { integer } from "../format.js";
import { useAction, usePolling, useResource } from "../live.js";
import { link } from "../router.js";
import { ACTIVE } from "./jobs.js";
import { announce, DataTable, ErrorNotice, Field, Section, Status } from "./ui.js";

const POLL_SECONDS = 2;

/** @param {{filter: object, onCreated: () => void}} props - the filter of the list above it */
export function DatasetForm({ filter, onCreated }) {
  const [form, setForm] = useState({ name: "dataset", mask: true, validation: "0.1", test: "0.1" });
  const create = useAction(async () => {
    const json = {
      name: form.name,
      filter,
      mask: form.mask ? "all" : [],
      validation_fraction: Number(form.validation),
      test_fraction: Number(form.test),
    };
    const dataset = await call("/v1/datasets", { method: "POST", json });
    announce(`The data set ${dataset.name} is queued`);
    onCreated();
  });
  const set = (name) => (event) => setForm({ ...form, [name]: event.currentTarget.value });
  const submit = (event) => {
    event.preventDefault();
    create.run();
  };
  return html`<${Section} title="Make a data set">
    <p class="muted">
      Training, validation and test files of all completions that the filter selects. Duplicates are
      left out.
    </p>
    <form onSubmit=${submit}>
      <div class="fields">
        <${Field}
          label="Name"
          control=${(ids) => html`<input ...${ids} required pattern="[a-z0-9\\-]{1,64}" value=${form.name} onInput=${set("name")} />`}
        />
        <${Field}
          label="Share for validation"
          control=${(ids) => html`<input ...${ids} type="number" min="0" max="0.5" step="0.05" value=${form.validation} onInput=${set("validation")} />`}
        />
        <${Field}
          label="Share for the test"
          control=${(ids) => html`<input ...${ids} type="number" min="0" max="0.5" step="0.05" value=${form.test} onInput=${set("test")} />`}
        />
      </div>
      <label class="check">
        <input
          type="checkbox"
          checked=${form.mask}
          onChange=${() => setForm({ ...form, mask: !form.mask })}
        />
        Mask personal data (addresses, phone numbers, cards, keys)
      </label>
      <${ErrorNotice} error=${create.error} />
      <div class="actions">
        <button type="submit" class="primary" disabled=${create.isBusy}>Make the data set</button>
      </div>
    </form>
  <//>`;
}

const COLUMNS = [
  {
    title: "Name",
    cell: (set) =>
      html`${set.name}
        <div class="muted small-text mono">${set.id}</div>`,
  },
  {
    title: "Status",
    cell: (set) =>
      html`<${Status} value=${set.status} />${set.error && html`<p>${set.error.message}</p>`}`,
  },
  {
    title: "Rows",
    isNumber: true,
    cell: (set) => (set.report ? integer(set.report.num_rows) : ""),
  },
  {
    title: "",
    cell: (set) =>
      set.training_file
        ? html`<a href=${link(["new"], { file: set.training_file })}>Train on it</a>`
        : "",
  },
];

export function Datasets() {
  const found = useResource(() => call("/v1/datasets?limit=20"), []);
  const rows = found.value?.data ?? [];
  usePolling(found.reload, rows.some((set) => ACTIVE.has(set.status)) ? POLL_SECONDS : null);
  return html`<${Section} title="Data sets">
    <${ErrorNotice} error=${found.error} />
    ${
      rows.length > 0
        ? html`<${DataTable}
            caption="Data sets, newest first"
            columns=${COLUMNS}
            rows=${rows}
            rowKey=${(set) => set.id}
          />`
        : html`<p class="muted">No data set yet.</p>`
    }
  <//>`;
}
