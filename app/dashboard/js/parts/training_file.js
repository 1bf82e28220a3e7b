/** Choice and upload of a training file, with a preview of its first rows and their tokens. */

import { html, useEffect, useRef, useState } from "../html.js";
import { call, request } from "../api.js";
import { bytes, integer, plural } from "../format.js";
import { useAction, useResource } from "../live.js";
import { SelectField } from "./fields.js";
import { fileNames } from "./job_form.js";
import { announce, DataTable, ErrorNotice, Field, Section } from "./ui.js";

const PREVIEW_BYTES = 65_536;
const PREVIEW_ROWS = 5;
const SHOWN_TOKENS = 48; // per row

/** Returns the first rows of JSON Lines. The last line may be cut off, so it is left out. */
function firstRows(text, isComplete) {
  const lines = text.split("\n");
  if (!isComplete) lines.pop();
  return lines
    .filter((line) => line.trim())
    .slice(0, PREVIEW_ROWS)
    .map((line) => {
      try {
        return JSON.parse(line);
      } catch {
        return { "not JSON": line };
      }
    });
}

/** Reads the first bytes of an uploaded file, and ends the download there. */
async function previewOf(id) {
  const response = await request(`/v1/files/${id}/content`);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  let isComplete = false;
  while (text.length < PREVIEW_BYTES && !isComplete) {
    const { value, done } = await reader.read();
    isComplete = done;
    text += decoder.decode(value, { stream: !done });
  }
  await reader.cancel();
  return firstRows(text, isComplete);
}

function contentOf(value) {
  if (!Array.isArray(value)) return typeof value === "string" ? value : JSON.stringify(value);
  return value
    .map((message) => `${message.role}: ${contentOf(message.content ?? message.tool_calls ?? "")}`)
    .join("\n");
}

function TokenCounts({ rows, model }) {
  const counts = useAction(async () =>
    Promise.all(
      rows.map((row) => {
        const json = row.messages
          ? { model, messages: row.messages }
          : { model, prompt: textOf(row) };
        return call("/tokenize", { method: "POST", json });
      }),
    ),
  );
  const [results, setResults] = useState(null);
  useEffect(() => setResults(null), [rows, model]);
  const count = async () => {
    const next = await counts.run();
    if (next) {
      setResults(next);
      announce("The tokens are counted");
    }
  };
  if (!model) return null;
  return html`<div>
    <button type="button" class="small" disabled=${counts.isBusy} onClick=${count}>
      Show the tokens of these rows
    </button>
    <${ErrorNotice} error=${counts.error} />
    ${
      results &&
      html`<ol class="tokens">
        ${results.map(({ count: total, tokens }, i) => {
          const rest = tokens.length > SHOWN_TOKENS ? " …" : "";
          return html`<li key=${i}>
            ${plural(total, "token")}:${" "}
            <code>${tokens.slice(0, SHOWN_TOKENS).join(" ")}${rest}</code>
          </li>`;
        })}
      </ol>`
    }
  </div>`;
}

function textOf(row) {
  return ["prompt", "completion", "input", "target", "text"]
    .map((name) => row[name] ?? "")
    .join("");
}

function Preview({ id, model }) {
  const rows = useResource(() => previewOf(id), [id]);
  if (!rows.value) return html`<${ErrorNotice} error=${rows.error} />`;
  const names = [...new Set(rows.value.flatMap(Object.keys))];
  const columns = [
    { title: "Row", cell: (i) => i + 1 },
    ...names.map((name) => ({
      title: name,
      cell: (i) =>
        html`<div class="cell-text">
          ${rows.value[i][name] === undefined ? "" : contentOf(rows.value[i][name])}
        </div>`,
    })),
  ];
  return html`<${DataTable}
      caption="First rows of the file"
      isCaptionHidden=${false}
      columns=${columns}
      rows=${rows.value.map((_, i) => i)}
      rowKey=${(i) => i}
    />
    <${TokenCounts} rows=${rows.value} model=${model} />`;
}

/** `chosen` is the id of a file, and `model` the model whose tokens the preview shows. */
export function TrainingFile({ files, chosen, onChoose, onUploaded, model }) {
  const input = useRef(null);
  const upload = useAction(async (file) => {
    const body = new FormData();
    body.append("purpose", "fine-tune");
    body.append("file", file);
    const created = await call("/v1/files", { method: "POST", body });
    announce(`${created.filename} is uploaded`);
    onUploaded(created);
  });
  const file = files.find((one) => one.id === chosen);
  return html`<${Section} title="Training file">
    <div class="fields">
      <${Field}
        label="Upload a file"
        help='JSON Lines, one object per line, such as {"prompt": "What is money?"}'
        control=${(ids) =>
          html`<input
            ...${ids}
            ref=${input}
            type="file"
            accept=".jsonl,.json,.txt"
            disabled=${upload.isBusy}
            onChange=${() => input.current.files[0] && upload.run(input.current.files[0])}
          />`}
      />
      <${SelectField}
        label="Or choose one"
        first=${files.length ? "Choose a file" : "No files yet"}
        options=${fileNames(files)}
        value=${chosen}
        onChange=${onChoose}
      />
    </div>
    ${upload.isBusy && html`<p class="muted" role="status">Uploading and checking each row …</p>`}
    <${ErrorNotice} error=${upload.error} />
    ${
      file &&
      html`<p>
        <strong>${file.filename}</strong>${" "}
        <span class="muted">${plural(file.rows, "row")}, ${bytes(file.bytes)}, ${file.id}</span>
      </p>`
    }
    ${chosen && html`<${Preview} id=${chosen} model=${model} />`}
  <//>`;
}
