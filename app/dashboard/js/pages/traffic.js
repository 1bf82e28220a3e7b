/** Stored completions: filter and inspect them, and create data sets from them. */

import { html, useState } from "../html.js";
import { call, withQuery } from "../api.js";
import { date, duration, integer } from "../format.js";
import { useAction, useResource } from "../live.js";
import { replaceQuery, route } from "../router.js";
import { Confirm } from "../parts/confirm.js";
import { DatasetForm, Datasets } from "../parts/datasets.js";
import { TextField } from "../parts/fields.js";
import {
  Ago,
  DataTable,
  Empty,
  ErrorNotice,
  Facts,
  Loading,
  PageHead,
  Section,
} from "../parts/ui.js";

const PATH = "/v1/chat/completions";
const PAGE_ROWS = 25;
const NO_FILTER = { model: "", metadata: "", after: "", before: "" };

/** Returns the seconds since the epoch of a local date and time, or null. */
function secondsOf(text) {
  const seconds = Math.floor(new Date(text).getTime() / 1000);
  return Number.isNaN(seconds) ? null : seconds;
}

/** Returns the pairs in a text such as "task=faq, release=12". Throws an Error with advice. */
function pairsOf(text) {
  const pairs = text
    .split(",")
    .map((pair) => pair.trim())
    .filter(Boolean);
  return pairs.map((pair) => {
    const [name, ...rest] = pair.split("=");
    const value = rest.join("=").trim();
    if (!name.trim() || !value) {
      throw new Error(`Metadata: write name=value instead of "${pair}", with commas between pairs.`);
    }
    return [name.trim(), value];
  });
}

/** Returns the filter of the address. Leaves out metadata that it cannot read. */
function filterOf(query) {
  const filter = Object.fromEntries(
    Object.keys(NO_FILTER).map((name) => [name, query.get(name) ?? ""]),
  );
  try {
    pairsOf(filter.metadata);
    return filter;
  } catch {
    return { ...filter, metadata: "" };
  }
}

function queryOf(filter) {
  const metadata = pairsOf(filter.metadata).map(([name, value]) => [`metadata[${name}]`, value]);
  return {
    model: filter.model.trim(),
    created_after: secondsOf(filter.after),
    created_before: secondsOf(filter.before),
    ...Object.fromEntries(metadata),
  };
}

/** Returns the filter as a data set takes it. */
export function datasetFilter(filter) {
  const fields = {
    model: filter.model.trim() || undefined,
    created_after: secondsOf(filter.after) ?? undefined,
    created_before: secondsOf(filter.before) ?? undefined,
  };
  return { ...fields, metadata: Object.fromEntries(pairsOf(filter.metadata)) };
}

function Filter({ applied, onApply }) {
  const [draft, setDraft] = useState(applied);
  const [error, setError] = useState(null);
  const bind = (name) => ({
    value: draft[name],
    onChange: (value) => setDraft({ ...draft, [name]: value }),
  });
  const clear = () => {
    setDraft(NO_FILTER);
    setError(null);
    onApply(NO_FILTER);
  };
  const submit = (event) => {
    event.preventDefault();
    try {
      pairsOf(draft.metadata);
    } catch (fault) {
      setError(fault);
      return;
    }
    setError(null);
    onApply(draft);
  };
  return html`<form class="card" role="search" onSubmit=${submit}>
    <div class="fields four">
      <${TextField} label="Model" placeholder="any model" ...${bind("model")} />
      <${TextField} label="Metadata" placeholder="task=faq, release=12" ...${bind("metadata")} />
      <${TextField} label="From" type="datetime-local" ...${bind("after")} />
      <${TextField} label="Until" type="datetime-local" ...${bind("before")} />
    </div>
    <${ErrorNotice} error=${error} />
    <div class="actions">
      <button type="submit" class="primary">Apply the filter</button>
      <button type="button" onClick=${clear}>Clear</button>
    </div>
  </form>`;
}

function answerOf(completion) {
  const { message, finish_reason: reason } = completion.choices[0];
  if (message.content) return message.content;
  if (message.tool_calls)
    return message.tool_calls
      .map((one) => `${one.function.name}(${one.function.arguments})`)
      .join("\n");
  return `(no text, ${reason})`;
}

function Inspect({ completion, onDeleted }) {
  const { usage } = completion;
  const path = `${PATH}/${completion.id}`;
  const messages = useResource(() => call(`${path}/messages?limit=100`), [completion.id]);
  const [isConfirming, setConfirming] = useState(false);
  const remove = async () => {
    await call(path, { method: "DELETE" });
    onDeleted();
  };
  const rows = messages.value?.data ?? [];
  return html`<${Section}
    title="Conversation"
    actions=${html`<button type="button" class="small" onClick=${() => setConfirming(true)}>Delete</button>`}
  >
    <${ErrorNotice} error=${messages.error} />
    <ol class="messages">
      ${rows.map(
        (message) =>
          html`<li key=${message.id}>
            <h3>${message.role}</h3>
            <p class="answer">${message.content ?? JSON.stringify(message.content_parts)}</p>
          </li>`,
      )}
      ${
        messages.value &&
        html`<li class="stored-answer">
          <h3>assistant <span class="muted">(the stored answer)</span></h3>
          <p class="answer">${answerOf(completion)}</p>
        </li>`
      }
    </ol>
    <${Facts}
      pairs=${[
        ["Id", html`<code class="break">${completion.id}</code>`],
        ["Model", completion.model],
        ["Created", date(completion.created)],
        ["Latency", duration(completion.latency_seconds)],
        ["Tokens", `${integer(usage.prompt_tokens)} in, ${integer(usage.completion_tokens)} out`],
        ["Ended by", completion.choices[0].finish_reason],
        [
          "Metadata",
          Object.entries(completion.metadata)
            .map((pair) => pair.join("="))
            .join(", "),
        ],
      ]}
    />
    ${
      isConfirming &&
      html`<${Confirm}
        title="Delete this completion?"
        text="Data sets that contain it remain."
        action="Delete it"
        isDanger=${true}
        onConfirm=${remove}
        onClose=${() => setConfirming(false)}
      />`
    }
  <//>`;
}

export default function Traffic() {
  const [filter, setFilter] = useState(() => filterOf(route.value.query));
  const [appended, setAppended] = useState({ filter, rows: [], hasMore: null });
  const [chosen, setChosen] = useState(null);
  const [numDatasets, setNumDatasets] = useState(0);
  const path = (after) =>
    withQuery(PATH, { ...queryOf(filter), order: "desc", limit: PAGE_ROWS, after });
  const first = useResource(() => call(path(null)), [filter]);
  // A page that arrives after a change of the filter belongs to the earlier one.
  const older = appended.filter === filter ? appended : { rows: [], hasMore: null };
  const rows = [...(first.value?.data ?? []), ...older.rows];
  const hasMore = older.hasMore ?? first.value?.has_more ?? false;
  const more = useAction(async () => {
    const page = await call(path(rows.at(-1).id));
    setAppended({ filter, rows: [...older.rows, ...page.data], hasMore: page.has_more });
  });
  const apply = (next) => {
    setChosen(null);
    setFilter({ ...next }); // a copy, so that an equal filter loads the list again
    replaceQuery(Object.fromEntries(Object.entries(next).filter(([, value]) => value)));
  };
  const columns = [
    {
      title: "Answer",
      cell: (row) =>
        html`<button
          type="button"
          class="link cell-text one-line"
          aria-pressed=${chosen?.id === row.id ? "true" : "false"}
          onClick=${() => setChosen(row)}
        >
          ${answerOf(row)}
        </button>`,
    },
    { title: "Model", cell: (row) => row.model },
    { title: "Tokens", isNumber: true, cell: (row) => integer(row.usage.total_tokens) },
    { title: "Latency", isNumber: true, cell: (row) => duration(row.latency_seconds) },
    { title: "Created", cell: (row) => html`<${Ago} at=${row.created} />` },
  ];
  return html`<${PageHead} title="Stored traffic" />
    <${Filter} applied=${filter} onApply=${apply} />
    <${ErrorNotice} error=${first.error} onRetry=${first.reload} />
    <div class="columns even">
      <div>
        <${Section}
          title="Completions"
          actions=${html`<button type="button" class="small" onClick=${() => apply(filter)}>Refresh</button>`}
        >
          ${first.isLoading && html`<${Loading} what="Loading stored completions" />`}
          ${
            first.value &&
            rows.length === 0 &&
            html`<${Empty} title="No stored completions"
              ><p>
                Chats with <code>store: true</code> are kept and shown here. A filter may also be
                too narrow.
              </p><//
            >`
          }
          <${DataTable}
            caption="Stored completions, newest first"
            columns=${columns}
            rows=${rows}
            rowKey=${(row) => row.id}
          />
          <${ErrorNotice} error=${more.error} />
          ${
            hasMore &&
            html`<button type="button" disabled=${more.isBusy} onClick=${() => more.run()}>
              Load older completions
            </button>`
          }
        <//>
        <${Datasets} key=${numDatasets} />
      </div>
      <div>
        ${
          chosen
            ? html`<${Inspect}
                key=${chosen.id}
                completion=${chosen}
                onDeleted=${() => apply(filter)}
              />`
            : html`<${Section} title="Conversation"
                ><p class="muted">Choose an answer in the list to read its conversation.</p><//
              >`
        }
        <${DatasetForm}
          filter=${datasetFilter(filter)}
          onCreated=${() => setNumDatasets(numDatasets + 1)}
        />
      </div>
    </div>`;
}
