/** The aliases of a model: point one at it, see the history, and roll back. */

import { html, useId, useState } from "../html.js";
import { aliasPath, call } from "../api.js";
import { date } from "../format.js";
import { useAction, useResource } from "../live.js";
import { Confirm } from "./confirm.js";
import { announce, DataTable, ErrorNotice, Field, Section } from "./ui.js";

const COLUMNS = [
  { title: "When", cell: (change) => date(change.created_at) },
  { title: "From", cell: (change) => change.from ?? html`<span class="muted">created</span>` },
  { title: "To", cell: (change) => change.to ?? html`<span class="muted">deleted</span>` },
  { title: "Key", cell: (change) => html`<code>${change.key_id}</code>` },
];

function History({ alias, target }) {
  const history = useResource(() => call(aliasPath(alias, "/history?limit=20")), [alias, target]);
  const rows = history.value?.data ?? [];
  return html`<${ErrorNotice} error=${history.error} />
    <${DataTable}
      caption=${`History of ${alias}`}
      columns=${COLUMNS}
      rows=${rows}
      rowKey=${(row) => row.id}
    />
    ${history.value && rows.length === 0 && html`<p class="muted">No changes are recorded.</p>`}`;
}

function Alias({ alias, model, onChange }) {
  const [isOpen, setOpen] = useState(false);
  const [dialog, setDialog] = useState(null);
  const rollBack = async () => {
    const next = await call(aliasPath(alias, "/rollback"), {
      method: "POST",
      json: { from: model.id },
    });
    announce(`${alias} points at ${next.model} now`);
    await onChange();
  };
  const remove = async () => {
    await call(aliasPath(alias), { method: "DELETE" });
    await onChange();
  };
  const dialogs = {
    rollback: {
      title: `Roll back ${alias}?`,
      text: "The alias points at the model before its newest change, for all new requests.",
      action: "Roll back",
      onConfirm: rollBack,
    },
    remove: {
      title: `Delete ${alias}?`,
      text: "Requests for the alias fail from now on. The model remains.",
      action: "Delete the alias",
      isDanger: true,
      onConfirm: remove,
    },
  };
  return html`<li>
    <div class="row">
      <strong>${alias}</strong>
      <div class="actions">
        <button type="button" class="small" onClick=${() => setDialog("rollback")}>
          Roll back<span class="visually-hidden"> ${alias}</span>
        </button>
        <button type="button" class="small" onClick=${() => setDialog("remove")}>
          Delete<span class="visually-hidden"> ${alias}</span>
        </button>
      </div>
    </div>
    <details onToggle=${(event) => setOpen(event.currentTarget.open)}>
      <summary>History<span class="visually-hidden"> of ${alias}</span></summary>
      ${isOpen && html`<${History} alias=${alias} target=${model.id} />`}
    </details>
    ${dialog && html`<${Confirm} ...${dialogs[dialog]} onClose=${() => setDialog(null)} />`}
  </li>`;
}

/** Points an alias at the model. `from` makes the service refuse it if the alias moved meanwhile. */
function SetAlias({ model, models, onChange }) {
  const [text, setText] = useState("");
  const [done, setDone] = useState("");
  const listId = useId();
  const others = models.filter((one) => one.id !== model.id);
  const known = others.flatMap((one) => one.aliases.map((alias) => [alias, one.id]));
  const current = known.find(([alias]) => alias === text)?.[1];
  const set = useAction(async () => {
    const json = current ? { model: model.id, from: current } : { model: model.id };
    await call(aliasPath(text), { method: "PUT", json });
    setDone(`${text} points at ${model.id} now.`);
    announce(`${text} points at ${model.id} now`);
    setText("");
    await onChange();
  });
  const submit = (event) => {
    event.preventDefault();
    set.run();
  };
  return html`<form onSubmit=${submit} class="inline-form">
    <${Field}
      label="Point an alias at this model"
      help=${current ? `It points at ${current} now.` : "Two names with @ between them."}
      control=${(ids) =>
        html`<input
          ...${ids}
          list=${listId}
          placeholder="support@live"
          pattern="[^@\\s]+@[^@\\s]+"
          required
          value=${text}
          onInput=${(event) => setText(event.currentTarget.value)}
        />`}
    />
    <datalist id=${listId}>
      ${known.map(([alias, id]) => html`<option value=${alias}>${id}</option>`)}
    </datalist>
    <button type="submit" disabled=${set.isBusy || !text.includes("@")}>
      ${current ? "Move the alias" : "Set the alias"}
    </button>
    <${ErrorNotice} error=${set.error} />
    ${done && html`<p class="muted" role="status">${done}</p>`}
  </form>`;
}

export function Aliases({ model, models, onChange }) {
  return html`<${Section} title="Aliases">
    ${model.aliases.length === 0 && html`<p class="muted">No alias points at this model.</p>`}
    <ul class="plain">
      ${model.aliases.map(
        (alias) =>
          html`<${Alias} key=${alias} alias=${alias} model=${model} onChange=${onChange} />`,
      )}
    </ul>
    <${SetAlias} model=${model} models=${models} onChange=${onChange} />
  <//>`;
}
