/** The lineage of a model: its teacher and start model, and the models that descend from it. */

import { html } from "../html.js";
import { count, percent } from "../format.js";
import { link } from "../router.js";
import { ErrorNotice, Loading, Section } from "./ui.js";

function parentsOf(model) {
  return [...new Set([model.teacher, model.base_model].filter(Boolean))];
}

/** Returns the models from which a model descends, the oldest first, without loops. */
function ancestors(model, byId, seen = new Set()) {
  return parentsOf(model).flatMap((id) => {
    if (seen.has(id)) return [];
    seen.add(id);
    const parent = byId.get(id);
    return [
      ...(parent ? ancestors(parent, byId, seen) : []),
      { id, model: parent ?? null, role: roleOf(model, id) },
    ];
  });
}

function roleOf(child, id) {
  if (child.teacher === id) return child.base_model === id ? "teacher and start model" : "teacher";
  return "start model";
}

function Tree({ model, models, depth = 0 }) {
  const children = models.filter((one) => parentsOf(one).includes(model.id));
  if (children.length === 0 || depth > 8) return null;
  return html`<ul>
    ${children.map(
      (child) =>
        html`<li key=${child.id}>
          <${Node} model=${child} />
          <${Tree} model=${child} models=${models} depth=${depth + 1} />
        </li>`,
    )}
  </ul>`;
}

function Node({ model, isCurrent, note }) {
  const agreement = model.evaluation?.student?.agreement;
  const facts = [count(model.num_parameters)];
  if (note) facts.unshift(note);
  if (agreement !== undefined) facts.push(`agreement ${percent(agreement)}`);
  return html`<div
    class=${`node${isCurrent ? " current" : ""}`}
    aria-current=${isCurrent ? "true" : undefined}
  >
    ${
      isCurrent
        ? html`<strong>${model.id}</strong>`
        : html`<a href=${link(["model", model.id])}>${model.id}</a>`
    }
    <span class="muted small-text"> ${facts.join(", ")} </span>
  </div>`;
}

/**
 * @param {object} model - the model of the page
 * @param {{value: {data: object[]}|null, error: Error|null, reload: () => void}} list - all models
 *   that the key may see. Others may be deleted, or belong to another project.
 */
export function Lineage({ model, list }) {
  return html`<${Section} title="Lineage">
    <${ErrorNotice} error=${list.error} onRetry=${list.reload} />
    ${
      list.value
        ? html`<${Family} model=${model} models=${list.value.data} />`
        : !list.error && html`<${Loading} what="Loading the lineage" />`
    }
  <//>`;
}

function Family({ model, models }) {
  const byId = new Map(models.map((one) => [one.id, one]));
  const older = ancestors(model, byId);
  const nested = (rest) => {
    const [next, ...others] = rest;
    if (next === undefined) {
      return html`<li>
        <${Node} model=${model} isCurrent=${true} /><${Tree} model=${model} models=${models} />
      </li>`;
    }
    return html`<li>
      ${
        next.model
          ? html`<${Node} model=${next.model} note=${next.role} />`
          : html`<div class="node">
              <span>${next.id}</span> <span class="muted small-text">${next.role}, not available</span>
            </div>`
      }
      <ul>
        ${nested(others)}
      </ul>
    </li>`;
  };
  const isAlone = older.length === 0 && !models.some((one) => parentsOf(one).includes(model.id));
  return html`<ul class="lineage">
      ${nested(older)}
    </ul>
    ${isAlone && html`<p class="muted">No other model descends from this one yet.</p>`}`;
}
