/** One model: facts, lineage, aliases, serving state, files and card. */

import { html, useState } from "../html.js";
import { call, modelPath, request } from "../api.js";
import { bytes, count, date, integer, words } from "../format.js";
import { useAction, usePolling, useResource } from "../live.js";
import { go, link } from "../router.js";
import { Aliases } from "../parts/aliases.js";
import { Confirm } from "../parts/confirm.js";
import { save } from "../parts/download.js";
import { Lineage } from "../parts/lineage.js";
import {
  announce,
  DataTable,
  ErrorNotice,
  Facts,
  Loading,
  PageHead,
  Progress,
  Section,
  Status,
} from "../parts/ui.js";

const LOADING_SECONDS = 1;
const BIG_BYTES = 1e9; // a browser may have to hold a download in memory

function servingText({ engine, weights, draft }) {
  return `Engine ${engine}, weights ${weights}${draft ? `, draft ${draft.model}` : ""}.`;
}

function Serving({ model }) {
  const path = (rest) => modelPath(model.id, rest);
  const status = useResource(() => call(path("/status")), [model.id]);
  const action = useAction(async (name) => {
    status.set(await call(path(`/${name}`), { method: "POST" }));
    announce(`${words(name)} requested`);
  });
  const isLoading =
    status.value?.state === "loading" ||
    status.value?.workers.some((one) => one.state === "loading");
  usePolling(status.reload, isLoading ? LOADING_SECONDS : null);
  const { state, is_pinned: isPinned, workers = [] } = status.value ?? {};
  const button = (name, isDisabled = false) =>
    html`<button
      type="button"
      class="small"
      disabled=${action.isBusy || isDisabled}
      onClick=${() => action.run(name)}
    >
      ${words(name)}
    </button>`;
  const columns = [
    { title: "Worker", cell: (row) => html`<code>${row.worker}</code>` },
    {
      title: "State",
      cell: (row) =>
        row.state === "loading"
          ? html`<${Progress} value=${row.percent} label="Loading" />`
          : html`<${Status} value=${row.state} />${row.error && html`<p>${row.error}</p>`}`,
    },
    { title: "Memory", isNumber: true, cell: (row) => bytes(row.bytes) },
    { title: "Weights", cell: (row) => row.weights ?? "" },
    {
      title: "First token",
      isNumber: true,
      cell: (row) => (row.first_token_ms ? `${row.first_token_ms.toFixed(0)} ms` : ""),
    },
  ];
  return html`<${Section}
    title="Serving"
    actions=${html`${button("load")} ${button("unload", isPinned)}
      ${button(isPinned ? "unpin" : "pin")}
      <button type="button" class="small" onClick=${status.reload}>Refresh</button>`}
  >
    <${ErrorNotice} error=${status.error ?? action.error} />
    ${
      status.value &&
      html`<p>
        <${Status} value=${state} /> ${isPinned && html`<span class="tag">pinned</span>`}
        <span class="muted"> ${servingText(model.serving)}</span>
      </p>`
    }
    ${
      workers.length > 0
        ? html`<${DataTable}
            caption="State on each worker"
            columns=${columns}
            rows=${workers}
            rowKey=${(row) => row.worker}
          />`
        : status.value &&
          html`<p class="muted">
            No serve worker is running. Start one with <code>stillhouse serve-worker</code>.
          </p>`
    }
  <//>`;
}

function Files({ model }) {
  const files = useResource(() => call(modelPath(model.id, "/files")), [model.id]);
  const download = useAction(async (name) => {
    const path = modelPath(model.id, `/files/${name.split("/").map(encodeURIComponent).join("/")}`);
    await save(path, name.split("/").at(-1));
  });
  const rows = files.value?.data ?? [];
  const columns = [
    { title: "File", cell: (file) => html`<code class="break">${file.name}</code>` },
    { title: "Size", isNumber: true, cell: (file) => bytes(file.bytes) },
    {
      title: "",
      cell: (file) =>
        html`<button
          type="button"
          class="small"
          disabled=${download.isBusy}
          onClick=${() => download.run(file.name)}
        >
          Download<span class="visually-hidden"> ${file.name}</span>
        </button>`,
    },
  ];
  return html`<${Section} title="Files">
    <${ErrorNotice} error=${files.error ?? download.error} />
    <${DataTable}
      caption="Files of the model"
      columns=${columns}
      rows=${rows}
      rowKey=${(file) => file.name}
    />
    ${
      rows.some((file) => file.bytes > BIG_BYTES) &&
      html`<p class="muted">
        For large files,${" "}
        <code>stillhouse models pull ${model.id} ./model --url ${location.origin}</code> resumes
        after a lost connection.
      </p>`
    }
  <//>`;
}

function Card({ model }) {
  const [isOpen, setOpen] = useState(false);
  const card = useResource(
    async () => (isOpen ? (await request(modelPath(model.id, "/card"))).text() : null),
    [model.id, isOpen],
  );
  return html`<${Section} title="Model card">
    <details onToggle=${(event) => setOpen(event.currentTarget.open)}>
      <summary>Show the model card</summary>
      <${ErrorNotice} error=${card.error} />
      ${
        card.value &&
        html`<pre class="model-card" tabindex="0" role="region" aria-label="Model card">
${card.value}</pre>`
      }
    </details>
  <//>`;
}

function Delete({ model }) {
  const [isConfirming, setConfirming] = useState(false);
  const remove = async () => {
    await call(modelPath(model.id), { method: "DELETE" });
    go(["models"]);
  };
  return html`<button type="button" onClick=${() => setConfirming(true)}>Delete</button> ${
      isConfirming &&
      html`<${Confirm}
        title="Delete the model?"
        text=${`${model.id} and its files are deleted. This cannot be undone.`}
        action="Delete the model"
        isDanger=${true}
        onConfirm=${remove}
        onClose=${() => setConfirming(false)}
      />`
    }`;
}

/** Link to the job that registered the model. An import has no page of its own. */
function SourceJob({ id }) {
  if (id.startsWith("import")) return html`<code>${id}</code>`;
  return html`<a href=${link(["job", id])}>${id}</a>`;
}

function About({ model }) {
  return html`<${Section} title="Facts">
    <${Facts}
      pairs=${[
        ["Origin", words(model.origin)],
        ["Architecture", `${model.architecture} (${model.family})`],
        ["Parameters", integer(model.num_parameters)],
        ["Layers", integer(model.num_layers)],
        ["Vocabulary", `${integer(model.vocab_size)} tokens`],
        ["Context", `${integer(model.context_length)} tokens`],
        ["Size", bytes(model.size_bytes)],
        ["Chat template", model.has_chat_template ? "yes" : "no"],
        ["Job", model.job_id && html`<${SourceJob} id=${model.job_id} />`],
        ["Owner", model.owned_by],
        ["Created", date(model.created)],
        ["SHA-256 of the weights", html`<code class="break">${model.weights_sha256}</code>`],
      ]}
    />
  <//>`;
}

function Checkpoint({ model }) {
  return html`<p class="muted">
    A checkpoint of the job <a href=${link(["job", model.job_id])}>${model.job_id}</a> with${" "}
    ${bytes(model.size_bytes)}. It can be used as long as the job keeps it.
  </p>`;
}

export default function Model({ id }) {
  const model = useResource(() => call(modelPath(id)), [id]);
  const all = useResource(() => call("/v1/models"), [id]);
  const reload = () => Promise.all([model.reload(), all.reload()]);
  if (!model.value) {
    return html`<${PageHead} title=${id} />
      <${ErrorNotice} error=${model.error} onRetry=${model.reload} />
      ${model.isLoading && html`<${Loading} what="Loading the model" />`}`;
  }
  const shown = model.value;
  if (shown.origin === "checkpoint")
    return html`<${PageHead} title=${id} /><${Checkpoint} model=${shown} />`;
  const others = all.value?.data ?? [shown];
  return html`<${PageHead}
      title=${shown.id}
      actions=${html`<a class="button primary" href=${link(["playground"], { a: shown.id })}
          >Try it</a
        >
        <a class="button" href=${link(["new"], { teacher: shown.id })}>Use as a teacher</a>
        <${Delete} model=${shown} />`}
    >
      <p class="subline">
        <span class="muted"
          >${count(shown.num_parameters)} parameters, ${bytes(shown.size_bytes)}</span
        >
        ${shown.aliases.map((alias) => html`<span class="tag">${alias}</span>`)}
      </p>
    <//>
    <${ErrorNotice} error=${model.error} onRetry=${model.reload} />
    <div class="columns">
      <div>
        <${Lineage} model=${shown} list=${all} />
        <${Aliases} model=${shown} models=${others} onChange=${reload} />
        <${Serving} model=${shown} />
      </div>
      <div>
        <${About} model=${shown} />
        <${Files} model=${shown} />
        <${Card} model=${shown} />
      </div>
    </div>`;
}
