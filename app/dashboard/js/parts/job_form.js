/** Fields of the form for a new job, and the request body that they describe. */

import { html } from "../html.js";
import { SelectField, TextArea, TextField } from "./fields.js";

export const EMPTY_FORM = {
  method: "distillation",
  teacher: "",
  model: "",
  layers: "",
  init: "",
  completions: "",
  divergence: "",
  epochs: "",
  maxNewTokens: "",
  suffix: "",
  seed: "",
  validationFile: "",
  more: "",
};
const DIVERGENCES = [
  "reverse_kl",
  "jsd",
  "skew_forward_kl",
  "skew_reverse_kl",
  "tvd",
  "hellinger",
  "alpha_beta",
  "logit_mse",
];
const INITS = {
  layers: "Some of its layers",
  checkpoint: "The model unchanged",
  lora: "Adapters (LoRA)",
};
const SOURCES = {
  dataset: "The rows of the file",
  teacher: "The teacher",
  student: "The student, on-policy",
};

const METHODS = [
  ["distillation", "Distillation", "The student learns the distribution of a teacher."],
  ["supervised", "Supervised fine-tuning", "A model learns the answers in the file."],
];

/** Returns the number or the list of numbers in a text such as "15" or "4, 8, 15". */
function layersOf(text) {
  const numbers = text
    .split(/[\s,]+/)
    .filter(Boolean)
    .map(Number);
  if (numbers.some((value) => !Number.isInteger(value) || value < 1)) {
    throw new Error("Layers: write one number, or several with commas between them.");
  }
  if (numbers.length === 0) return undefined;
  return numbers.length === 1 ? numbers[0] : numbers;
}

function numberOf(text) {
  return text === "" ? undefined : Number(text);
}

/** Returns an object without undefined values, or undefined if nothing is left. */
function filled(values) {
  const kept = Object.entries(values).filter(([, value]) => value !== undefined && value !== "");
  return kept.length ? Object.fromEntries(kept) : undefined;
}

function merged(base, more) {
  const result = { ...base };
  for (const [name, value] of Object.entries(more)) {
    const isObject = value !== null && typeof value === "object" && !Array.isArray(value);
    result[name] = isObject && result[name] ? merged(result[name], value) : value;
  }
  return result;
}

function moreOptions(text) {
  if (!text.trim()) return {};
  let options;
  try {
    options = JSON.parse(text);
  } catch (error) {
    throw new Error(`More options: this is not JSON (${error.message}).`);
  }
  if (options === null || typeof options !== "object" || Array.isArray(options)) {
    throw new Error("More options: write a JSON object.");
  }
  return options;
}

/** Returns the body of the request that creates the job. Throws an Error with advice. */
export function bodyOf(form, trainingFile) {
  const epochs = numberOf(form.epochs);
  const hyperparameters = filled({ n_epochs: epochs });
  const isDistillation = form.method === "distillation";
  const options = isDistillation
    ? filled({
        teacher: form.teacher,
        student: filled({ init: form.init, num_layers: layersOf(form.layers) }),
        data: filled({
          completions: form.completions,
          max_new_tokens: numberOf(form.maxNewTokens),
        }),
        objective: filled({ divergence: form.divergence }),
        hyperparameters,
      })
    : filled({ hyperparameters });
  const block = merged(options ?? {}, moreOptions(form.more));
  return filled({
    model: form.model || (isDistillation ? form.teacher : ""),
    training_file: trainingFile,
    validation_file: form.validationFile,
    suffix: form.suffix,
    seed: numberOf(form.seed),
    method: { type: form.method, [form.method]: block },
  });
}

/** The fields, with the models and the files to choose from. */
export function JobFields({ form, setForm, models, files }) {
  const set = (name) => (value) => setForm({ ...form, [name]: value });
  const bind = (name) => ({ value: form[name], onChange: set(name) });
  const names = Object.fromEntries(models.map((model) => [model.id, model.id]));
  const isDistillation = form.method === "distillation";
  return html`<${Methods} ...${bind("method")} />
    <div class="fields">
      ${
        isDistillation &&
        html`<${SelectField}
          label="Teacher"
          first="Choose a model"
          options=${names}
          ...${bind("teacher")}
        />`
      }
      <${SelectField}
        label="Start model"
        help=${isDistillation ? "The student is built from this model." : "This model is trained."}
        first=${isDistillation ? "The teacher" : "Choose a model"}
        options=${names}
        ...${bind("model")}
      />
      ${isDistillation && html`<${StudentFields} bind=${bind} />`}
      <${TextField}
        label="Epochs"
        type="number"
        min="1"
        max="1000"
        placeholder=${isDistillation ? "3" : "automatic"}
        ...${bind("epochs")}
      />
      <${TextField}
        label="Suffix"
        help="It becomes part of the model's name."
        maxlength="64"
        placeholder="support"
        ...${bind("suffix")}
      />
      <${SelectField}
        label="Validation file"
        first="Hold out a tenth of the rows"
        options=${fileNames(files)}
        ...${bind("validationFile")}
      />
    </div>
    <details>
      <summary>More options</summary>
      <div class="fields">
        ${isDistillation && html`<${ObjectiveFields} bind=${bind} />`}
        <${TextField} label="Seed" type="number" min="0" placeholder="0" ...${bind("seed")} />
        <${TextArea}
          label=${`Further options of method.${form.method} as JSON`}
          help="They are added to the options above. docs/jobs.md lists all of them."
          rows="4"
          class="mono"
          spellcheck="false"
          placeholder=${'{"evaluation": {"num_samples": 8}}'}
          ...${bind("more")}
        />
      </div>
    </details>`;
}

/** Returns the labels of files in a select field, by file id. */
export function fileNames(files) {
  return Object.fromEntries(
    files.map((file) => [file.id, `${file.filename} (${file.rows ?? "?"} rows)`]),
  );
}

function Methods({ value, onChange }) {
  return html`<fieldset class="methods">
    <legend>Method</legend>
    ${METHODS.map(
      ([name, title, help]) =>
        html`<label key=${name} class="option">
          <input
            type="radio"
            name="method"
            checked=${value === name}
            onChange=${() => onChange(name)}
          />
          <span><strong>${title}</strong><br /><span class="muted">${help}</span></span>
        </label>`,
    )}
  </fieldset>`;
}

function StudentFields({ bind }) {
  return html`<${TextField}
      label="Layers of the student"
      help="One number, or several (4, 8, 15) to train one student per size. Empty: half of them."
      placeholder="half"
      ...${bind("layers")}
    />
    <${SelectField}
      label="Student begins as"
      first="Automatic"
      options=${INITS}
      ...${bind("init")}
    />
    <${SelectField}
      label="Answers come from"
      first="The file, or else the teacher"
      options=${SOURCES}
      ...${bind("completions")}
    />`;
}

function ObjectiveFields({ bind }) {
  return html`<${SelectField}
      label="Divergence"
      first="forward_kl"
      options=${Object.fromEntries(DIVERGENCES.map((name) => [name, name]))}
      ...${bind("divergence")}
    />
    <${TextField}
      label="Tokens per answer at most"
      type="number"
      min="1"
      placeholder="128"
      ...${bind("maxNewTokens")}
    />`;
}
