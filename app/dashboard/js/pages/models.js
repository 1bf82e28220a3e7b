/** All models that the key may use. */

import { html, useState } from "../html.js";
import { call } from "../api.js";
import { bytes, count, integer, words } from "../format.js";
import { useResource } from "../live.js";
import { link } from "../router.js";
import { Ago, Code, DataTable, Empty, ErrorNotice, Loading, PageHead } from "../parts/ui.js";

const COLUMNS = [
  {
    title: "Model",
    cell: (model) =>
      html`<a href=${link(["model", model.id])}>${model.id}</a>
        ${model.aliases.map((alias) => html` <span class="tag">${alias}</span>`)}`,
  },
  { title: "Origin", cell: (model) => words(model.origin) },
  { title: "Architecture", cell: (model) => model.architecture },
  { title: "Parameters", isNumber: true, cell: (model) => count(model.num_parameters) },
  { title: "Layers", isNumber: true, cell: (model) => integer(model.num_layers) },
  { title: "Context", isNumber: true, cell: (model) => integer(model.context_length) },
  { title: "Size", isNumber: true, cell: (model) => bytes(model.size_bytes) },
  {
    title: "Teacher",
    cell: (model) =>
      model.teacher ? html`<a href=${link(["model", model.teacher])}>${model.teacher}</a>` : "",
  },
  { title: "Created", cell: (model) => html`<${Ago} at=${model.created} />` },
];

export default function Models() {
  const models = useResource(() => call("/v1/models"), []);
  const [text, setText] = useState("");
  const all = models.value?.data ?? [];
  const shown = all.filter((model) =>
    [model.id, model.teacher, model.architecture, model.origin, ...model.aliases].some((value) =>
      value?.toLowerCase().includes(text.toLowerCase()),
    ),
  );
  return html`<${PageHead} title="Models" />
    <div class="toolbar" role="search">
      <label>
        <span class="visually-hidden">Search models</span>
        <input
          type="search"
          placeholder="Search name, alias, teacher or architecture"
          value=${text}
          onInput=${(event) => setText(event.currentTarget.value)}
        />
      </label>
      <button type="button" onClick=${models.reload}>Refresh</button>
    </div>
    <${ErrorNotice} error=${models.error} onRetry=${models.reload} />
    ${models.isLoading && html`<${Loading} what="Loading models" />`}
    ${models.value && all.length === 0 && html`<${NoModels} />`}
    ${
      all.length > 0 &&
      html`<p class="muted" role="status">${shown.length} of ${all.length} models</p>
        <${DataTable}
          caption="Models, newest first"
          columns=${COLUMNS}
          rows=${shown}
          rowKey=${(model) => model.id}
        />`
    }`;
}

const IMPORT = `stillhouse models import ./my-teacher --name my-teacher \\
  --url ${location.origin} --api-key $STILLHOUSE_API_KEY`;

function NoModels() {
  return html`<${Empty} title="No models yet">
    <p>Import a teacher first: a folder, a .gguf file, or a repository of the Hugging Face Hub.</p>
    <${Code} label="Import a model from another machine" text=${IMPORT} />
  <//>`;
}
