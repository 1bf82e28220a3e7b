/** Scatter plot of a few models as SVG. Each point can get the focus, and a table has its data. */

import { html } from "../html.js";
import { DataTable } from "./ui.js";

const WIDTH = 420;
const HEIGHT = 220;
const LEFT = 58;
const BOTTOM = 34;
const TOP = 18;
const RIGHT = 24;

function scale(values, low, high) {
  const min = Math.min(...values);
  const max = Math.max(...values);
  const room = (max - min || Math.abs(max) || 1) * 0.12;
  const [from, to] = [min - room, max + room];
  return { of: (value) => low + ((value - from) / (to - from)) * (high - low), from, to };
}

function Axes({ x, y, horizontal, vertical }) {
  const ticks = [0.1, 0.5, 0.9];
  const at = (axis, share) => axis.from + share * (axis.to - axis.from);
  return html`<g class="axes">
    ${ticks.map((share) => {
      const value = at(vertical, share);
      const place = vertical.of(value);
      return html`<line x1=${LEFT} x2=${WIDTH - RIGHT} y1=${place} y2=${place} />
        <text x=${LEFT - 6} y=${place + 4} text-anchor="end">${y.format(value)}</text>`;
    })}
    ${ticks.map((share) => {
      const value = at(horizontal, share);
      return html`<text x=${horizontal.of(value)} y=${HEIGHT - 16} text-anchor="middle"
        >${x.format(value)}</text
      >`;
    })}
    <text x=${(LEFT + WIDTH - RIGHT) / 2} y=${HEIGHT - 2} text-anchor="middle">${x.label}</text>
  </g>`;
}

function Point({ point, left, top, text }) {
  const shape =
    point.kind === "teacher"
      ? html`<rect x=${left - 5} y=${top - 5} width="10" height="10" />`
      : html`<circle cx=${left} cy=${top} r=${point.isChosen ? 6 : 5} />`;
  const isNearEdge = left > WIDTH - 110;
  const name = point.isChosen ? `${point.label} (chosen)` : point.label;
  return html`<g
    class=${`point ${point.kind}${point.isChosen ? " chosen" : ""}`}
    tabindex="0"
    role="img"
    aria-label=${text}
  >
    <title>${text}</title>
    ${shape}
    <text
      x=${left + (isNearEdge ? -10 : 10)}
      y=${top - 8}
      text-anchor=${isNearEdge ? "end" : "start"}
      >${name}</text
    >
  </g>`;
}

/**
 * `points` are figures of models with a `label`. `x` and `y` say which figures are shown, with the
 * text of the axis and the function that formats a value.
 */
export function Scatter({ title, note, points, x, y }) {
  const shown = points.filter(
    (point) => point[x.name] !== undefined && point[y.name] !== undefined,
  );
  if (shown.length === 0) return null;
  const horizontal = scale(
    shown.map((point) => point[x.name]),
    LEFT,
    WIDTH - RIGHT,
  );
  const vertical = scale(
    shown.map((point) => point[y.name]),
    HEIGHT - BOTTOM,
    TOP,
  );
  const text = (point) =>
    `${point.label}: ${x.label} ${x.format(point[x.name])}, ${y.label} ${y.format(point[y.name])}`;
  const columns = [
    { title: "Model", cell: (point) => (point.isChosen ? `${point.label} (chosen)` : point.label) },
    { title: x.label, isNumber: true, cell: (point) => x.format(point[x.name]) },
    { title: y.label, isNumber: true, cell: (point) => y.format(point[y.name]) },
    {
      title: "Gate",
      cell: (point) => (point.passed === undefined ? "" : point.passed ? "passed" : "not passed"),
    },
  ];
  return html`<figure class="chart">
    <figcaption>
      <span class="chart-title">${title}</span> ${note && html`<span class="muted">${note}</span>`}
    </figcaption>
    <svg class="scatter" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="group" aria-label=${title}>
      <${Axes} x=${x} y=${y} horizontal=${horizontal} vertical=${vertical} />
      ${shown.map(
        (point) =>
          html`<${Point}
            key=${point.label}
            point=${point}
            left=${horizontal.of(point[x.name])}
            top=${vertical.of(point[y.name])}
            text=${text(point)}
          />`,
      )}
    </svg>
    <details class="data">
      <summary>Data of this chart<span class="visually-hidden">: ${title}</span></summary>
      <${DataTable}
        caption=${`Data: ${title}`}
        columns=${columns}
        rows=${shown}
        rowKey=${(point) => point.label}
      />
    </details>
  </figure>`;
}
