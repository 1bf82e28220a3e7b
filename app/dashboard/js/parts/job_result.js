/** The result of a job: a table with intervals, sample answers side by side, and a ladder's plots. */

import { html, useState } from "../html.js";
import { call } from "../api.js";
import { bytes, count, integer, number, percent, plural, words } from "../format.js";
import { useAction, useResource } from "../live.js";
import { save } from "./download.js";
import { Scatter } from "./scatter.js";
import { DataTable, ErrorNotice, Section } from "./ui.js";

/** The compared models in their order, with their headings. */
const MODELS = [
  ["teacher", "Teacher"],
  ["untrained", "Untrained student"],
  ["ce_baseline", "Student of the text alone"],
  ["before", "Before"],
  ["student", "Student"],
  ["after", "After"],
];
const CHOSEN_ON_ROWS =
  " The best checkpoint was chosen on these rows, so the figures are slightly too good.";
const fraction = (value) => percent(value);
const METRICS = [
  ["kl", "KL to the teacher", number, "lower is better"],
  ["agreement", "Agreement", fraction, "higher is better"],
  ["token_accuracy", "Token accuracy", fraction, "higher is better"],
  ["accuracy", "Accuracy", fraction, "higher is better"],
  ["macro_f1", "Macro-F1", number, "higher is better"],
  ["accuracy_teacher", "Accuracy against the teacher", fraction, "higher is better"],
  ["loss", "Loss", number, "lower is better"],
  ["perplexity", "Perplexity", number, "lower is better"],
  ["rouge_l", "ROUGE-L to the teacher", number, "higher is better"],
  ["rouge_l_reference", "ROUGE-L to the reference", number, "higher is better"],
  ["exact_match", "Equal to the teacher", fraction, "higher is better"],
  ["exact_match_reference", "Equal to the reference", fraction, "higher is better"],
  ["answer_tokens", "Tokens per answer", number, ""],
  ["num_parameters", "Parameters", count, ""],
  ["num_layers", "Layers", integer, ""],
  ["weights_bytes", "Size of the weights", bytes, ""],
  ["tokens_per_second", "Tokens/s, one request", number, "higher is better"],
  ["tokens_per_second_batched", "Tokens/s, many requests", number, "higher is better"],
];
const COST_METRICS = new Set([
  "num_parameters",
  "num_layers",
  "weights_bytes",
  "tokens_per_second",
  "tokens_per_second_batched",
]);
export const QUALITY_METRICS = METRICS.filter(([name]) => !COST_METRICS.has(name));

function comparedModels(result) {
  return MODELS.filter(([name]) => result[name]);
}

function Value({ entry, name, format }) {
  if (entry[name] === undefined || entry[name] === null) return "–";
  const interval = entry.intervals?.[name];
  return html`<div>${format(entry[name])}</div>
    ${
      interval &&
      html`<div class="muted small-text">${format(interval[0])} to ${format(interval[1])}</div>`
    }`;
}

/** The change by training, and whether its confidence interval excludes 0. */
function Change({ difference, name, format }) {
  if (difference?.[name] === undefined) return "";
  const [low, high] = difference.intervals[name];
  const value = difference[name];
  const isClear = low > 0 || high < 0;
  return html`<div>${value > 0 ? "+" : ""}${format(value)}</div>
    <div class="muted small-text">${isClear ? "clear" : "within the error"}</div>`;
}

export function JobResult({ job }) {
  const { result } = job;
  const models = comparedModels(result);
  const difference = result.differences?.untrained ?? result.differences?.before;
  const rows = METRICS.filter(([name]) =>
    models.some(([model]) => result[model][name] !== undefined),
  );
  const columns = [
    {
      title: "",
      cell: ([, label, , better]) =>
        html`${label} ${better && html`<div class="muted small-text">${better}</div>`}`,
    },
    ...models.map(([model, title]) => ({
      title,
      isNumber: true,
      cell: ([name, , format]) =>
        html`<${Value} entry=${result[model]} name=${name} format=${format} />`,
    })),
  ];
  if (difference) {
    columns.push({
      title: "Change",
      isNumber: true,
      cell: ([name, , format]) =>
        html`<${Change} difference=${difference} name=${name} format=${format} />`,
    });
  }
  const kind = result.judged_on === "test" ? "test rows" : "held-out rows";
  const questions = result.num_judged_questions;
  const num = result.num_test_rows ?? result.num_validation_rows;
  return html`<${Section} title="Result">
    <p class="muted">
      Measured on ${integer(num)} ${kind}${questions && ` with ${plural(questions, "question")}`}.
      The second line of a cell is the 95 % interval.
      ${result.is_chosen_on_judged_rows && CHOSEN_ON_ROWS}
    </p>
    ${result.compression && html`<${Compression} compression=${result.compression} />`}
    ${(result.missing ?? []).map(
      (part) =>
        html`<div class="notice error">
          <p>${words(part.part)} is missing: ${part.message}</p>
        </div>`,
    )}
    <${DataTable}
      caption="Teacher and student on the same rows"
      columns=${columns}
      rows=${rows}
      rowKey=${([name]) => name}
    />
    <${ResultFiles} ids=${job.result_files} />
  <//>`;
}

function Compression({ compression }) {
  const { parameters, speedup, speedup_batched: batched } = compression;
  const parts = [`${number(parameters, 3)} times fewer parameters than the teacher`];
  if (speedup) parts.push(`${number(speedup, 3)} times as fast with one request`);
  if (batched) parts.push(`${number(batched, 3)} times as fast with many`);
  return html`<p><strong>${parts.join(", ")}.</strong></p>`;
}

function ResultFiles({ ids }) {
  const files = useResource(() => Promise.all(ids.map((id) => call(`/v1/files/${id}`))), [ids]);
  const download = useAction((file) => save(`/v1/files/${file.id}/content`, file.filename));
  if (!ids.length) return null;
  return html`<div class="actions">
      <span class="muted">Result files:</span>
      ${(files.value ?? []).map(
        (file) =>
          html`<button
            type="button"
            class="small"
            key=${file.id}
            disabled=${download.isBusy}
            onClick=${() => download.run(file)}
          >
            Download ${file.filename}
          </button>`,
      )}
    </div>
    <${ErrorNotice} error=${files.error ?? download.error} />`;
}

/** Answers of the compared models to the same prompts. */
export function Samples({ result }) {
  const models = [...comparedModels(result), ["reference", "Reference in the file"]];
  return html`<${Section} title="Sample answers">
    <p class="muted">Greedy answers to held-out prompts, unedited.</p>
    ${result.samples.map((sample, i) => {
      const shown = models.filter(([model]) => sample[model] !== undefined);
      return html`<article class="sample" key=${i}>
        <h3><span class="muted">Prompt:</span> ${sample.prompt}</h3>
        <div class="sample-answers">
          ${shown.map(
            ([model, title]) =>
              html`<div key=${model}>
                <h4>${title}</h4>
                <p class="answer">${sample[model] || html`<span class="muted">No text</span>`}</p>
              </div>`,
          )}
        </div>
      </article>`;
    })}
  <//>`;
}

/** Size, quality and speed of the students of a ladder. */
export function Ladder({ result }) {
  const students = result.ladder.map((entry) => ({ ...(entry.test ?? entry), ...pick(entry) }));
  const measured = QUALITY_METRICS.filter(([name]) =>
    students.some((student) => student[name] !== undefined),
  );
  const [chosen, setChosen] = useState(measured[0]?.[0]);
  const metric = measured.find(([name]) => name === chosen);
  const points = [
    ...students.map((student) => ({ ...student, isChosen: student.chosen, kind: "student" })),
    ...(result.teacher ? [{ ...result.teacher, label: "Teacher", kind: "teacher" }] : []),
  ];
  return html`<${Section} title="Sizes">
    <p class="muted">One student was trained per size. The chosen one became the model.</p>
    <label class="inline">
      Quality by
      <select value=${chosen} onChange=${(event) => setChosen(event.currentTarget.value)}>
        ${measured.map(([name, label]) => html`<option value=${name}>${label}</option>`)}
      </select>
    </label>
    <div class="charts">
      ${
        metric &&
        html`<${Scatter}
          title=${`${metric[1]} by size`}
          note=${metric[3]}
          points=${points}
          x=${{ name: "num_parameters", label: "Parameters", format: count }}
          y=${{ name: metric[0], label: metric[1], format: metric[2] }}
        />`
      }
      ${
        points.some((point) => point.tokens_per_second) &&
        html`<${Scatter}
          title="Speed by size"
          note="higher is better"
          points=${points}
          x=${{ name: "num_parameters", label: "Parameters", format: count }}
          y=${{ name: "tokens_per_second", label: "Tokens/s, one request", format: number }}
        />`
      }
    </div>
  <//>`;
}

function pick({ label, passed, chosen }) {
  return { label, passed, chosen };
}
