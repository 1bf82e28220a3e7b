/** The fields of the form for a new job, and the request that they make. */

import { html } from "../html.js";
import { Field } from "./ui.js";

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
  "forward_kl",
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

function Choice({ label, help, value, options, onChange, first }) {
  return html`<${Field}
    label=${label}
    help=${help}
    control=${(ids) =>
      html`<select
        ...${ids}
        value=${value}
        onChange=${(event) => onChange(event.currentTarget.value)}
      >
        <option value="">${first}</option>
        ${Object.entries(options).map(([name, text]) => html`<option key=${name} value=${name}>${text}</option>`)}
      </select>`}
  />`;
}

/** @param {{form: object, setForm: (form: object) => void, models: object[], files: object[]}} props */
export function JobFields({ form, setForm, models, files }) {
  const set = (name) => (value) => setForm({ ...form, [name]: value });
  const input = (name, props) => (ids) =>
    html`<input
      ...${ids}
      ...${props}
      value=${form[name]}
      onInput=${(event) => set(name)(event.currentTarget.value)}
    />`;
  const names = Object.fromEntries(models.map((model) => [model.id, model.id]));
  const isDistillation = form.method === "distillation";
  return html`<fieldset class="methods">
      <legend>Method</legend>
      ${[
        ["distillation", "Distillation", "The student learns the distribution of a teacher."],
        ["supervised", "Supervised fine-tuning", "A model learns the answers in the file."],
      ].map(
        ([value, title, help]) =>
          html`<label key=${value} class="option">
            <input
              type="radio"
              name="method"
              checked=${form.method === value}
              onChange=${() => set("method")(value)}
            />
            <span><strong>${title}</strong><br /><span class="muted">${help}</span></span>
          </label>`,
      )}
    </fieldset>
    <div class="fields">
      ${isDistillation && html`<${Choice} label="Teacher" value=${form.teacher} options=${names} onChange=${set("teacher")} first="Choose a model" />`}
      <${Choice}
        label="Start model"
        help=${isDistillation ? "The student is built from this model." : "This model is trained."}
        value=${form.model}
        options=${names}
        onChange=${set("model")}
        first=${isDistillation ? "The teacher" : "Choose a model"}
      />
      ${
        isDistillation &&
        html`<${Field}
            label="Layers of the student"
            help="One number, or several (4, 8, 15) to train one student per size. Empty: half of them."
            control=${input("layers", { inputmode: "numeric", placeholder: "half" })}
          />
          <${Choice}
            label="Student begins as"
            value=${form.init}
            options=${INITS}
            onChange=${set("init")}
            first="Automatic"
          />
          <${Choice}
            label="Answers come from"
            value=${form.completions}
            options=${SOURCES}
            onChange=${set("completions")}
            first="The file, or else the teacher"
          />`
      }
      <${Field}
        label="Epochs"
        control=${input("epochs", { type: "number", min: 1, max: 1000, placeholder: isDistillation ? "3" : "automatic" })}
      />
      <${Field}
        label="Suffix"
        help="It becomes part of the model's name."
        control=${input("suffix", { maxlength: 64, placeholder: "support" })}
      />
      <${Choice}
        label="Validation file"
        value=${form.validationFile}
        options=${Object.fromEntries(files.map((file) => [file.id, `${file.filename} (${file.rows} rows)`]))}
        onChange=${set("validationFile")}
        first="Hold out a tenth of the rows"
      />
    </div>
    <details>
      <summary>More options</summary>
      <div class="fields">
        ${
          isDistillation &&
          html`<${Choice}
              label="Divergence"
              value=${form.divergence}
              options=${Object.fromEntries(DIVERGENCES.map((name) => [name, name]))}
              onChange=${set("divergence")}
              first="forward_kl"
            />
            <${Field}
              label="Tokens per answer at most"
              control=${input("maxNewTokens", { type: "number", min: 1, placeholder: "128" })}
            />`
        }
        <${Field}
          label="Seed"
          control=${input("seed", { type: "number", min: 0, placeholder: "0" })}
        />
        <${Field}
          label=${`Further options of method.${form.method} as JSON`}
          help="They are added to the options above. docs/jobs.md lists all of them."
          isWide=${true}
          control=${(ids) => html`<textarea ...${ids} rows="4" class="mono" spellcheck="false" placeholder=${'{"evaluation": {"num_samples": 8}}'} value=${form.more} onInput=${(event) => set("more")(event.currentTarget.value)}></textarea>`}
        />
      </div>
    </details>`;
}
