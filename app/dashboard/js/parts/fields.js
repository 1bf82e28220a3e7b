/** Labelled fields of forms: text, long text and choices. `onChange` gets the value. */

import { html } from "../html.js";
import { Field } from "./ui.js";

/** A field for one line. Further properties, such as `type`, are those of the input. */
export function TextField({ label, help, isWide, value, onChange, ...input }) {
  const onInput = (event) => onChange(event.currentTarget.value);
  return html`<${Field}
    label=${label}
    help=${help}
    isWide=${isWide}
    control=${(ids) => html`<input ...${ids} ...${input} value=${value} onInput=${onInput} />`}
  />`;
}

export function TextArea({ label, help, value, onChange, ...textarea }) {
  const onInput = (event) => onChange(event.currentTarget.value);
  return html`<${Field}
    label=${label}
    help=${help}
    isWide=${true}
    control=${(ids) =>
      html`<textarea ...${ids} ...${textarea} value=${value} onInput=${onInput}></textarea>`}
  />`;
}

/** The options of a choice. `options` maps values to texts, and `first` is the empty choice. */
export function Options({ options, first }) {
  return html`${first !== undefined && html`<option value="">${first}</option>`}
  ${Object.entries(options).map(
    ([value, text]) => html`<option key=${value} value=${value}>${text}</option>`,
  )}`;
}

export function SelectField({ label, help, value, options, first, onChange }) {
  const onSelect = (event) => onChange(event.currentTarget.value);
  return html`<${Field}
    label=${label}
    help=${help}
    control=${(ids) =>
      html`<select ...${ids} value=${value} onChange=${onSelect}>
        <${Options} options=${options} first=${first} />
      </select>`}
  />`;
}

/** A choice on one line with its label, for toolbars. */
export function InlineSelect({ label, value, options, onChange }) {
  return html`<label class="inline">
    ${label}
    <select value=${value} onChange=${(event) => onChange(event.currentTarget.value)}>
      <${Options} options=${options} />
    </select>
  </label>`;
}
