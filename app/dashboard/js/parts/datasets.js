/** Data sets of stored completions: the form that creates one, and the list. */

import { html, useState } from "../html.js";
import { call } from "../api.js";
import { integer } from "../format.js";
import { useAction, usePolling, useResource } from "../live.js";
import { link } from "../router.js";
import { ACTIVE } from "./jobs.js";
import { TextField } from "./fields.js";
import { announce, DataTable, ErrorNotice, Section, Status } from "./ui.js";

const POLL_SECONDS = 2;
const SHARE = { type: "number", min: "0", max: "0.5", step: "0.05" };

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
  const bind = (name) => ({
    value: form[name],
    onChange: (value) => setForm({ ...form, [name]: value }),
  });
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
        <${TextField} label="Name" required pattern="[a-z0-9\\-]{1,64}" ...${bind("name")} />
        <${TextField} label="Share for validation" ...${SHARE} ...${bind("validation")} />
        <${TextField} label="Share for the test" ...${SHARE} ...${bind("test")} />
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
  const datasets = useResource(() => call("/v1/datasets?limit=20"), []);
  const rows = datasets.value?.data ?? [];
  usePolling(datasets.reload, rows.some((set) => ACTIVE.has(set.status)) ? POLL_SECONDS : null);
  return html`<${Section} title="Data sets">
    <${ErrorNotice} error=${datasets.error} />
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
